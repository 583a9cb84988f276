from ckptsvc.control.pace import PROGRESS_EVERY, PROGRESS_REPORTS, STALL_REPORTS, progress_every, stalls_within


def test_agents_of_a_small_job_tell_their_progress_as_often_as_they_look():
    assert progress_every(1) == progress_every(100) == PROGRESS_EVERY


def test_all_agents_of_a_large_job_together_tell_no_more_than_a_coordinator_takes():
    for nodes in (1000, 10_624, 100_000):
        assert nodes / progress_every(nodes) <= PROGRESS_REPORTS
        assert nodes / stalls_within(nodes) <= STALL_REPORTS
