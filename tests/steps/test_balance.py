import oracles
from laws import close, lowrank, merged, regauged

UPDATES = [lowrank(9, 7, r, seed=r) for r in (2, 3)]


def test_balance_is_the_basis_balanced_and_leaves_no_gauge() -> None:
    pairs = [oracles.balanced(u.dense()) for u in UPDATES]
    u, v, cores = oracles.core_space([a for a, _ in pairs], [b for _, b in pairs])
    expected = u @ oracles.ties(cores) @ v.T
    for updates in (UPDATES, [regauged(x) for x in UPDATES]):
        close(merged(updates, method="ties", steps=["balance"]), expected)
        close(merged(updates, method="ties", basis="balanced"), expected)
        close(merged(updates, method="ties", space="core:basis=balanced"), expected)


def test_it_comes_before_the_method_wherever_it_is_listed() -> None:
    one, other = (
        merged(UPDATES, method="ties", steps=s) for s in (["balance", "isotropize"], ["isotropize", "balance"])
    )
    close(one, other)


def test_other_spaces_do_not_see_it() -> None:
    for space in ("knots", "full"):
        close(
            merged(UPDATES, method="ties", space=space, steps=["balance"]), merged(UPDATES, method="ties", space=space)
        )
