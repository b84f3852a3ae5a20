"""Numbers about adapters and merges: how alike they are, and what a merge keeps of each."""

from coremerge.diagnostics.alignment import Alignment as Alignment
from coremerge.diagnostics.alignment import align as align
from coremerge.diagnostics.alignment import align_module as align_module
from coremerge.diagnostics.retention import Retention as Retention
from coremerge.diagnostics.retention import retain as retain
from coremerge.diagnostics.retention import retain_module as retain_module
