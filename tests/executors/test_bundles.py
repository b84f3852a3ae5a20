import math

from hypothesis import given
from hypothesis import strategies as st

from coremerge.executors import bundles


@given(st.lists(st.floats(0.001, 10)), st.floats(0.01, 5), st.integers(1, 8))
def test_bundles_keep_order_and_leave_nobody_idle(costs: list[float], most: float, workers: int) -> None:
    found = bundles(costs, float, most, workers)
    assert [cost for bundle in found for cost in bundle] == costs
    limit = min(most, sum(costs) / (4 * workers)) if costs else 0
    assert all(bundle and (len(bundle) == 1 or math.fsum(bundle) <= limit * (1 + 1e-9)) for bundle in found)
