"""On from here in weight space."""

from __future__ import annotations

from coremerge.steps import STEPS, Lift, Step


@STEPS.register("lift", unitary=True, source="the published code of KnOTS with Iso-C, arXiv 2509.17786")
def lift() -> Step:
    """After merging: the merged update as a whole m × n matrix again, for the steps that come after this one.

    Steps act on the core that the method gave. That is the same, as coordinates are isometric, but for directions that
    the core has no place for: ``--space knots --step lift --step isotropize:span=false`` flattens over all min(m, n) of
    them, as the published KnOTS with Iso does, where without ``lift`` it is over those of the core. Choose it to
    reproduce that; not else, as those directions are arbitrary, cost accuracy and take the memory of full space.
    """
    return Lift()
