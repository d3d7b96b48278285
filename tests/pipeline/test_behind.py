"""Jobs beside a device: in their order, one at a time, and what they raise is raised."""

import threading
import time

import pytest
import torch

from lissom.pipeline.behind import Behind

DEVICE = torch.device("meta")  # any that is not the processor


def test_jobs_run_in_order_beside_the_caller_and_are_done_when_the_context_ends():
    seen, threads = [], set()
    with Behind(DEVICE) as behind:
        for i in range(5):

            def job(i=i):
                time.sleep(0.02 * (5 - i))
                seen.append(i)
                threads.add(threading.get_ident())

            behind.do(job)
            assert len(seen) >= i  # all before it, so no more than one waits
    assert seen == [0, 1, 2, 3, 4]
    assert threads and threading.get_ident() not in threads


def test_on_the_processor_a_job_is_done_at_once():
    seen = []
    with Behind(torch.device("cpu")) as behind:
        behind.do(lambda: seen.append(threading.get_ident()))
        assert seen == [threading.get_ident()]


@pytest.mark.parametrize("more", [True, False])
def test_what_a_job_raises_comes_from_the_next_call_or_the_end(more):
    def fail():
        raise OSError("no space left")

    seen = []
    with pytest.raises(OSError, match="no space"), Behind(DEVICE) as behind:
        behind.do(fail)
        if more:
            behind.do(lambda: seen.append(1))
    assert not seen


def test_an_error_of_the_caller_lets_the_job_in_flight_finish():
    seen = []
    with pytest.raises(ValueError), Behind(DEVICE) as behind:
        behind.do(lambda: (time.sleep(0.05), seen.append(1)))
        raise ValueError
    assert seen == [1]
