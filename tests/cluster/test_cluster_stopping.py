"""A request to stop waits for the end of a step, and for nothing else."""

import os
import signal
import time

import pytest

from dpo_keras.cluster import RunStopped, StopRequest


def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_between_steps_the_signal_ends_the_work_at_once_and_only_once():
    stop = StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    with stop.signals():
        with pytest.raises(RunStopped, match="stopped by SIGTERM between steps"):
            kill()
        kill()  # while the first is being dealt with
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_within_a_step_it_waits(number):
    stop = StopRequest()
    with stop.signals(), stop.at_step_end():
        kill(number)
        assert stop.requested and stop.reason == number.name
        kill(signal.SIGTERM)
    assert str(stop.stopped(7)) == f"stopped by {number.name} after step 7, which is saved."


def test_a_second_ctrl_c_does_not_wait():
    stop = StopRequest()
    with stop.signals(), stop.at_step_end():
        kill(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as error:
            kill(signal.SIGINT)
    assert not isinstance(error.value, RunStopped)


def test_a_signal_is_announced_once_and_what_others_said_is_not():
    told, silent = [], []
    stop = StopRequest()
    stop.announce = told.append
    with stop.signals(), stop.at_step_end():
        kill()
        kill()
        time.sleep(0.1)
    assert told == ["SIGTERM"]
    heard = StopRequest()
    heard.announce = silent.append
    with heard.signals(), heard.at_step_end():
        heard.request("SIGTERM at worker 1 (b:1)")
        time.sleep(0.1)
    assert heard.reason == "SIGTERM at worker 1 (b:1)" and silent == []
