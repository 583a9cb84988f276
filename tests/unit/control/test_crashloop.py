from ckptsvc.control.crashloop import UNKNOWN_AFTER, Crash, CrashLoop, common


def crash(attempt, **changes):
    fields = {"rank": 3, "node": "b", "how": "exited with status 1", "step": 150, "seconds": 5.0}
    return Crash(attempt, **{**fields, **changes})


def test_a_job_that_gets_no_further_is_ended():
    loop = CrashLoop(3)
    assert loop.crashed(crash(1), saved=100) == ""  # this one had saved something
    assert loop.crashed(crash(2), saved=100) == ""
    assert loop.crashed(crash(3), saved=100) == ""
    assert loop.crashed(crash(4), saved=100) == (
        "3 attempts in a row have failed, and none has come beyond step 100;"
        " each time rank 3 on node b exited with status 1 after step 150"
    )


def test_every_newer_step_is_a_new_beginning():
    loop = CrashLoop(2)
    assert [loop.crashed(crash(n), saved=n // 2) for n in range(20)] == [""] * 20


def test_an_older_one_is_not():
    loop = CrashLoop(2)
    loop.crashed(crash(1), saved=100)
    loop.crashed(crash(2), saved=90)
    assert loop.crashed(crash(3), saved=99) != ""


def test_without_a_limit_it_goes_on():
    loop = CrashLoop(0)
    assert [loop.crashed(crash(n), saved=-1) for n in range(99)] == [""] * 99


def test_where_nobody_tells_how_far_it_is_a_long_attempt_counts_as_progress():
    loop = CrashLoop(2)
    assert loop.crashed(crash(1, step=None), saved=-1) == ""
    assert loop.crashed(crash(2, step=None, seconds=UNKNOWN_AFTER), saved=-1) == ""
    assert loop.crashed(crash(3, step=None), saved=-1) == ""
    assert loop.crashed(crash(4, step=None), saved=-1).startswith(
        "2 attempts in a row have failed, and none has come to"
    )


def test_what_attempts_have_in_common_is_said():
    assert common([crash(1), crash(2, rank=4)]) == "each time on node b exited with status 1 after step 150"
    assert common([crash(1, step=None), crash(2, node="c")]) == "each time rank 3 exited with status 1"
    different = [crash(1), crash(2, rank=1, node="c", how="died", step=7), crash(3, step=9)]
    assert common(different) == "they have nothing in common: exited with status 1 (2 times), died (1 times)"
