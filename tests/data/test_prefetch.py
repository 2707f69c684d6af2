"""The prefetcher keeps order, computes ahead in one other thread, measures waiting and passes errors on."""

import threading
import time

import pytest

from llamapro.data.prefetch import Prefetcher


def test_results_come_in_order_from_one_other_thread():
    threads = set()

    def work(number):
        threads.add(threading.get_ident())
        return number

    with Prefetcher((lambda n=n: work(n)) for n in range(20)) as fetched:
        assert list(fetched) == list(range(20))
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_the_next_result_is_computed_while_the_consumer_works():
    second_began = threading.Event()
    with Prefetcher(iter([lambda: 1, second_began.set])) as fetched:
        assert next(fetched) == 1
        assert second_began.wait(5)


def test_only_waiting_is_counted_as_waiting():
    with Prefetcher(iter([lambda: time.sleep(0.5), lambda: None])) as fetched:
        next(fetched)
        assert fetched.take_wait_seconds() >= 0.4
        time.sleep(0.2)
        next(fetched)
        assert fetched.take_wait_seconds() < 0.3


def test_an_error_comes_where_its_result_would_have_come():
    with Prefetcher(iter([lambda: 1, lambda: 1 // 0])) as fetched:
        assert next(fetched) == 1
        with pytest.raises(ZeroDivisionError):
            next(fetched)


def test_leaving_early_ends_the_thread():
    before = set(threading.enumerate())
    with Prefetcher((lambda: 1) for _ in range(1000)) as fetched:
        next(fetched)
    assert set(threading.enumerate()) <= before  # what others left may end meanwhile
