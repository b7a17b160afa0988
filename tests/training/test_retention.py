"""Which checkpoints stay: every rule alone, their union, and that no order of events loses what must not be lost."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.retention import Aside, Candidate, Rules, best, decide, decide_aside

ALL = {"keep_last": 1, "keep_every": 0, "keep_best": 0, "keep_optimizer": 1}


def steps(*numbers: int, **told: object) -> list[Candidate]:
    return [Candidate(number, **told) for number in numbers]  # type: ignore[arg-type]


@pytest.mark.parametrize("rules, gone", [
    (Rules(**ALL), (2, 4, 6)),
    (Rules(**{
        **ALL, "keep_last": 2
    }), (2, 4)),
    (Rules(**{
        **ALL, "keep_every": 4
    }), (2, 6)),
    (Rules(**{
        **ALL, "keep_every": 6,
        "keep_last": 2
    }), (2, 4)),
    (Rules(**{
        **ALL, "keep_last": 0
    }), (2, 4, 6)),
])
def test_the_rules_are_a_union(rules, gone):
    assert decide(steps(2, 4, 6, 8), rules).checkpoints == gone


def test_the_best_stay_and_of_equals_the_later():
    scored = [
        Candidate(2, score=(0.5, 0.9)),
        Candidate(4, score=(0.7, 0.1)),
        Candidate(6, score=(0.7, 0.1)),
        Candidate(8, score=None),
        Candidate(10)
    ]
    assert best(scored, 3) == [6, 4, 2]
    decision = decide(scored, Rules(**{**ALL, "keep_best": 1}))
    assert decision.checkpoints == (2, 4, 8)
    assert decision.kept == {6: ("best", ), 10: ("last", "newest")}


def test_a_step_whose_evaluation_is_to_come_stays_for_the_sake_of_the_best_alone():
    waiting = [Candidate(2, pending=True), *steps(4, 6)]
    assert decide(waiting, Rules(**{**ALL, "keep_best": 1})).checkpoints == (4, )
    assert decide(waiting, Rules(**ALL)).checkpoints == (2, 4)


def test_what_must_stay_stays_whatever_the_rules_say():
    found = decide([
        Candidate(2),
        Candidate(4, verified=False),
        Candidate(6, whole=False, verified=False),
        Candidate(8),
        Candidate(10),
        Candidate(12),
        Candidate(14, verified=False)
    ], Rules(**ALL), resumed=[8], reached=13)  # yapf: disable
    assert found.checkpoints == (2, 10)
    assert found.kept == {
        4: ("unverified", ),
        6: ("writing", "unverified"),
        8: ("resume", ),
        12: ("last", ),
        14: ("newest", "ahead", "unverified")
    }


def test_new_ones_that_are_damaged_cost_no_good_one():
    found = decide([*steps(2, 4, 6), *steps(8, 10, 12, verified=False)], Rules(**{**ALL, "keep_last": 2}))
    assert found.checkpoints == (2, )


def test_the_optimizers_files_go_first():
    found = decide(steps(100, 200, 300, 400, 500), Rules(keep_last=2, keep_every=100, keep_optimizer=2))
    assert found.checkpoints == () and found.optimizer == (100, 200, 300)
    found = decide(steps(100, 200, 300, 400, 500),
                   Rules(keep_last=2, keep_every=100, keep_optimizer=2),
                   resumed=[200],
                   reached=350)
    assert found.optimizer == (100, 300)  # 400 and 500 are about to be written again
    assert decide([Candidate(100, optimizer=False), *steps(200, 300)],
                  Rules(keep_last=1, keep_every=100, keep_optimizer=1)).optimizer == (200, )


def test_merged_models_stay_unless_they_shall_go_with_their_checkpoints():
    told = [Candidate(2, raw=False), *steps(4, 6)]
    assert decide(told, Rules(**ALL)).merged == ()
    assert decide(told, Rules(**ALL, merged_too=True)).merged == (2, 4)
    waiting = [Candidate(2, raw=False, pending=True), *steps(4, 6)]
    assert decide(waiting, Rules(**ALL, merged_too=True)).merged == (4, )  # it is still to be evaluated
    alone = [Candidate(number, raw=False) for number in (2, 4, 6)]  # somebody removed the checkpoints by hand
    assert decide(alone, Rules(**ALL, merged_too=True)).merged == (2, 4)


def test_nothing_is_decided_of_nothing():
    assert decide([], Rules()).checkpoints == ()


CANDIDATES = st.lists(st.builds(Candidate,
                                st.integers(1, 40),
                                raw=st.booleans(),
                                whole=st.booleans(),
                                optimizer=st.booleans(),
                                merged=st.booleans(),
                                verified=st.booleans(),
                                score=st.none() | st.tuples(st.sampled_from([0.0, 0.5, 1.0])),
                                pending=st.booleans()),
                      unique_by=lambda one: one.number)
RULES = st.builds(Rules, st.integers(0, 4), st.integers(0, 5), st.integers(0, 3), st.integers(0, 4), st.booleans())


@given(CANDIDATES, RULES, st.sets(st.integers(1, 40), max_size=2), st.none() | st.integers(1, 40))
def test_no_case_loses_what_must_stay(candidates, rules, resumed, reached):
    found = decide(candidates, rules, resumed, reached)
    raw = {one.number: one for one in candidates if one.raw}
    gone = set(found.checkpoints)
    assert gone <= raw.keys() and gone.isdisjoint(found.kept) and gone | found.kept.keys() == raw.keys()
    for number in gone | set(found.optimizer):
        one = raw[number]
        assert one.whole and one.verified and number != max(raw) and number not in resumed
        assert reached is None or number <= reached
    good = sorted(number for number, one in raw.items() if one.whole and one.verified)
    assert gone.isdisjoint(good[-max(1, rules.keep_last):])
    assert gone.isdisjoint(best(raw.values(), rules.keep_best))
    assert set(found.optimizer).isdisjoint(good[-max(1, rules.keep_optimizer):])
    # Applied again to what is left, the rules take nothing more.
    left = [one for one in candidates if one.number not in gone]
    assert decide(left, rules, resumed, reached).checkpoints == ()


def test_of_what_a_resume_moved_away_the_newest_whole_one_and_the_unverified_stay():
    half, poisoned, compared, newest = Aside(2, 9, False, False), Aside(2, 6, True, False), Aside(2, 4, True, True), Aside(3, 4, True, True)
    found = [half, poisoned, compared, newest]
    assert decide_aside(found, steps(2, 4)) == {poisoned: "unverified", newest: "newest aside"}
    assert decide_aside(found, steps(2, 4, verified=False)) == dict.fromkeys(found, "no other")
    assert decide_aside(found, [Candidate(4, raw=False)]) == dict.fromkeys(found, "no other")
    assert decide_aside([half], steps(2)) == {}
