"""The rules of the pool with scripted arrivals, and what the manager refuses without any model."""

from __future__ import annotations

import random
from collections.abc import Iterable
from datetime import timedelta
from math import inf
from typing import Any

import pytest

from tabagent_model import (
    AsyncModelManager,
    ContextTooSmallError,
    InvalidRequestError,
    ModelBusyError,
    ModelConfig,
    ModelManager,
    ModelNotFoundError,
    ModelNotLoadedError,
    NoRoomError,
    OutOfMemoryError,
    QueueFullError,
)
from tabagent_model.manager import seconds_of
from tabagent_model.manager._pool import ANYWHERE, PATIENCE, Member, Order, Pool, Ticket

GIB = 2**30


def pool_of(names: str, max_loaded: float = inf, max_bytes: float = inf, **needs: int) -> Pool:
    """A pool of models with names of one letter, and what they need in GiB."""
    pool = Pool(max_loaded, max_bytes * GIB)
    for name in names:
        pool.register(Member(name, gib(cpu=needs.get(name, 1))))
    return pool


def gib(**needs: float) -> dict[str, int]:
    return {device: int(size * GIB) for device, size in needs.items()}


def told(orders: Iterable[Order]) -> list[str]:
    return [
        f"{order.verb} {order.model}" + (f" #{order.ticket.number}" if order.ticket else "")
        for order in orders
    ]


def use(pool: Pool, name: str, now: float = 0.0, owner: Any = None) -> Ticket:
    """Somebody uses a model that is loaded by then, whatever it takes."""
    ticket = Ticket(name, "use", owner)
    pending = pool.ask(ticket, now)
    while pending:
        order = pending.pop(0)
        if order.verb == "load":
            pending += pool.loaded(order.model, now)
        elif order.verb == "unload":
            pending += pool.unloaded(order.model, now)
    assert ticket in pool.members[name].users
    return ticket


def visit(pool: Pool, name: str, now: float) -> None:
    assert told(pool.leave(use(pool, name, now), now)) == []


def states(pool: Pool) -> dict[str, str]:
    return {name: member.state for name, member in pool.members.items()}


def refusal(orders: list[Order]) -> Exception:
    (order,) = orders
    assert order.verb == "refuse"
    assert order.error is not None
    return order.error


class TestWaiting:
    def test_two_who_ask_for_one_model_load_it_once(self):
        """K05"""
        pool = pool_of("a")
        assert told(pool.ask(Ticket("a", "use"), 0)) == ["load a"]
        assert told(pool.ask(Ticket("a", "load"), 0)) == []
        assert told(pool.loaded("a", 1)) == ["grant a #1", "grant a #2"]
        assert told(pool.ask(Ticket("a", "use"), 2)) == ["grant a #3"]

    def test_two_models_that_both_fit_are_loaded_side_by_side(self):
        pool = pool_of("ab", max_loaded=2)
        assert told(pool.ask(Ticket("a", "use"), 0)) == ["load a"]
        assert told(pool.ask(Ticket("b", "use"), 0)) == ["load b"]

    def test_a_b_a_becomes_a_a_b(self):
        pool = pool_of("ab", max_loaded=1)
        first = use(pool, "a")
        assert told(pool.ask(Ticket("b", "use"), 1)) == []
        third = Ticket("a", "use")
        assert told(pool.ask(third, 2)) == ["grant a #3"]
        assert told(pool.leave(first, 3)) == []
        assert told(pool.leave(third, 4)) == ["unload a"]
        assert told(pool.unloaded("a", 5)) == ["load b"]
        assert told(pool.loaded("b", 6)) == ["grant b #2"]

    def test_nobody_is_passed_over_for_ever(self):
        pool = pool_of("ab", max_loaded=1)
        inside = [use(pool, "a")]
        waiting = Ticket("b", "use")
        pool.ask(waiting, 0)
        late = [Ticket("a", "use") for _ in range(20)]
        orders = [order for ticket in late for order in pool.ask(ticket, 0)]
        granted = [f"grant a #{number}" for number in range(3, 3 + PATIENCE)]
        assert told(orders) == [*granted, "drain a"]
        inside += late[:PATIENCE]
        assert [order for ticket in inside[1:] for order in pool.leave(ticket, 1)] == []
        assert told(pool.leave(inside[0], 1)) == ["unload a"]
        assert told(pool.unloaded("a", 1)) == ["load b"]
        assert told(pool.loaded("b", 1)) == ["grant b #2"]
        assert told(pool.leave(waiting, 1)) == ["unload b"]
        assert told(pool.unloaded("b", 1)) == ["load a"]
        assert len(pool.loaded("a", 1)) == len(late) - PATIENCE

    def test_those_who_came_together_are_served_in_turns_of_bounded_length(self):
        pool = pool_of("ab", max_loaded=1)
        for name in "a" + "b" + "a" * 20:
            pool.ask(Ticket(name, "use"), 0)
        numbers = [1, *range(3, 3 + PATIENCE)]
        assert told(pool.loaded("a", 1)) == [*(f"grant a #{n}" for n in numbers), "drain a"]

    def test_requests_without_a_ticket_count_as_well(self):
        pool = pool_of("ab", max_loaded=1)
        pool.ask(Ticket("a", "load"), 0)
        pool.loaded("a", 0)
        assert told(pool.running("a", True, 1)) == []
        assert told(pool.ask(Ticket("b", "use"), 2)) == []
        assert told(pool.running("a", False, 3)) == ["unload a"]

    def test_whose_use_was_over_before_it_was_told_leaves_as_well(self):
        pool = pool_of("a")
        pool.members["a"].keep_alive_s = 0
        pool.ask(Ticket("a", "load"), 0)
        assert told(pool.loaded("a", 0)) == ["grant a #1"]
        assert told(pool.running("a", False, 1)) == []
        assert told(pool.running("a", False, 2, was_used=True)) == ["unload a"]

    def test_the_more_urgent_go_first(self):
        pool = pool_of("abc", max_loaded=1)
        pool.members["c"].priority = "high"
        first = use(pool, "a")
        pool.ask(Ticket("b", "use"), 0)
        pool.ask(Ticket("c", "use"), 0)
        pool.leave(first, 1)
        assert told(pool.unloaded("a", 1)) == ["load c"]

    def test_the_room_of_one_who_waits_is_not_taken_by_those_behind(self):
        pool = pool_of("abc", max_bytes=4, a=3, b=3)
        use(pool, "a")
        pool.ask(Ticket("b", "use"), 0)
        assert told(pool.ask(Ticket("c", "use"), 0)) == []

    def test_a_full_queue_is_an_error_at_once(self):
        pool = Pool(max_loaded=1, queue_size=1)
        pool.register(Member("a"))
        pool.ask(Ticket("a", "use"), 0)
        assert isinstance(refusal(pool.ask(Ticket("a", "use"), 0)), QueueFullError)

    def test_one_who_waits_for_himself_is_told_so(self):
        pool = pool_of("ab", max_loaded=1)
        use(pool, "a", owner="me")
        for wish in (
            Ticket("b", "use", "me"),
            Ticket("b", "swap", "me"),
            Ticket("a", "unload", "me"),
        ):
            error = refusal(pool.ask(wish, 1))
            assert isinstance(error, ModelBusyError)
            assert "`a` would have to leave" in str(error)
        assert told(pool.ask(Ticket("b", "use", "you"), 1)) == []

    def test_one_who_is_inside_may_come_in_again_while_others_wait_for_him(self):
        pool = pool_of("ab", max_loaded=1)
        use(pool, "a", owner="me")
        assert told(pool.ask(Ticket("a", "unload", "you"), 1)) == ["drain a"]
        assert told(pool.ask(Ticket("a", "use", "you"), 2)) == []
        assert told(pool.ask(Ticket("a", "use", "me"), 3)) == ["grant a #4"]
        assert isinstance(refusal(pool.ask(Ticket("b", "use", "me"), 4)), ModelBusyError)

    def test_who_need_not_leave_any_more_serves_those_who_came_meanwhile(self):
        pool = pool_of("abc", max_loaded=2)
        use(pool, "a")
        other = use(pool, "c")
        pool.ask(Ticket("b", "use"), 0)
        for _ in range(PATIENCE):
            pool.ask(Ticket("a", "use"), 0)
        assert states(pool)["a"] == "draining"
        late = Ticket("a", "use")
        assert told(pool.ask(late, 1)) == []
        assert told(pool.leave(other, 2)) == ["unload c"]
        assert told(pool.unloaded("c", 3)) == ["load b"]
        assert told(pool.loaded("b", 4)) == ["stay a", "grant b #3", f"grant a #{late.number}"]


class TestLeaving:
    def test_the_longest_unused_leaves_first(self):
        pool = pool_of("abc", max_loaded=2)
        for now, name in enumerate("aba"):
            visit(pool, name, now)
        assert told(pool.ask(Ticket("c", "use"), 9)) == ["unload b"]
        assert told(pool.unloaded("b", 9)) == ["load c"]

    def test_as_many_leave_as_the_memory_needs(self):
        pool = pool_of("abcd", max_bytes=6, a=2, b=2, c=2, d=4)
        for now, name in enumerate("abc"):
            visit(pool, name, now)
        assert told(pool.ask(Ticket("d", "use"), 9)) == ["unload a", "unload b"]
        assert told(pool.unloaded("a", 9)) == []
        assert told(pool.unloaded("b", 9)) == ["load d"]

    def test_what_turns_out_to_be_smaller_leaves_more_room(self):
        pool = pool_of("ab", max_bytes=6, a=5, b=3)
        visit(pool, "a", 0)
        assert told(pool.weighed("a", gib(cpu=3), 1)) == []
        assert told(pool.ask(Ticket("b", "use"), 2)) == ["load b"]

    def test_nobody_leaves_in_vain(self):
        pool = pool_of("abc", max_bytes=6, a=1, b=5, c=5)
        visit(pool, "a", 0)
        visit(pool, "b", 1)
        assert told(pool.ask(Ticket("c", "use"), 9)) == ["unload b"]

    def test_the_idle_leave_before_the_busy_however_old(self):
        pool = pool_of("abc", max_loaded=2)
        use(pool, "a", 0)
        visit(pool, "b", 5)
        assert told(pool.ask(Ticket("c", "use"), 9)) == ["unload b"]

    def test_the_less_urgent_leave_before_the_longer_unused(self):
        pool = pool_of("abc", max_loaded=2)
        pool.members["b"].priority = "low"
        visit(pool, "a", 0)
        visit(pool, "b", 5)
        assert told(pool.ask(Ticket("c", "use"), 9)) == ["unload b"]

    def test_where_all_are_busy_the_first_that_gets_idle_leaves(self):
        pool = pool_of("abc", max_loaded=2)
        use(pool, "a")
        second = use(pool, "b")
        assert told(pool.ask(Ticket("c", "use"), 1)) == []
        assert told(pool.leave(second, 2)) == ["unload b"]

    def test_the_pinned_stay_and_the_error_has_the_figures(self):
        pool = pool_of("abc", max_bytes=6, a=2, b=3, c=5)
        pool.members["a"].is_pinned = True
        visit(pool, "a", 0)
        visit(pool, "b", 1)
        error = refusal(pool.ask(Ticket("c", "use"), 2))
        assert str(error) == (
            "`c` needs 5.0 GiB; 1.0 GiB of the 6.0 GiB of `max_bytes` are free, and what could"
            " leave is pinned: `a` (2.0 GiB)\n\nhint: `unpin` one of them, or raise `max_bytes`"
        )
        assert isinstance(error, NoRoomError)
        assert (error.needed, error.free, error.pinned) == (5 * GIB, GIB, ("a",))
        assert states(pool) == {"a": "loaded", "b": "loaded", "c": "unloaded"}

    def test_pinned_models_can_take_all_places(self):
        pool = pool_of("ab", max_loaded=1)
        pool.members["a"].is_pinned = True
        visit(pool, "a", 0)
        error = refusal(pool.ask(Ticket("b", "use"), 1))
        assert str(error).startswith("`b` needs 1.0 GiB; all 1 places are taken, and what could")

    def test_what_is_larger_than_everything_is_refused_at_once(self):
        pool = pool_of("ab", max_bytes=4, b=5)
        visit(pool, "a", 0)
        error = refusal(pool.ask(Ticket("b", "use"), 1))
        assert str(error) == (
            "`b` needs 5.0 GiB; 3.0 GiB of the 4.0 GiB of `max_bytes` are free\n\n"
            "hint: raise `max_bytes`, or lower its `n_ctx` or `max_parallel`"
        )
        assert states(pool)["a"] == "loaded"

    def test_a_model_leaves_when_it_was_not_used_for_so_long(self):
        pool = pool_of("a")
        pool.members["a"].keep_alive_s = 60
        first = use(pool, "a", 0)
        assert pool.next_time == inf
        pool.leave(first, 100)
        assert pool.next_time == 160
        visit(pool, "a", 150)
        assert pool.next_time == 210
        assert told(pool.tick(209)) == []
        assert told(pool.tick(210)) == ["unload a"]
        assert pool.next_time == inf

    def test_keep_alive_0_is_at_once_but_not_before_it_was_used(self):
        pool = pool_of("a")
        pool.members["a"].keep_alive_s = 0
        pool.ask(Ticket("a", "load"), 0)
        assert told(pool.loaded("a", 1)) == ["grant a #1"]
        assert told(pool.tick(100)) == []
        pool.running("a", True, 101)
        assert told(pool.running("a", False, 102)) == ["unload a"]
        pool.unloaded("a", 103)
        ticket = use(pool, "a", 104)
        assert told(pool.leave(ticket, 105)) == ["unload a"]

    def test_a_caller_may_say_how_long_it_stays_from_then_on(self):
        pool = pool_of("a")
        visit(pool, "a", 0)
        assert pool.next_time == inf
        pool.ask(Ticket("a", "load", keep_alive_s=5), 10)
        assert pool.next_time == 15

    def test_a_pinned_model_is_kept_alive(self):
        pool = pool_of("a")
        pool.members["a"].keep_alive_s = 1
        pool.members["a"].is_pinned = True
        visit(pool, "a", 0)
        assert (pool.next_time, told(pool.tick(100))) == (inf, [])

    def test_unload_waits_for_those_inside_and_lets_nobody_in(self):
        pool = pool_of("a")
        inside = use(pool, "a")
        assert told(pool.ask(Ticket("a", "unload"), 1)) == ["drain a"]
        assert told(pool.ask(Ticket("a", "use"), 2)) == []
        assert told(pool.leave(inside, 3)) == ["unload a"]
        assert told(pool.unloaded("a", 4)) == ["grant a #2", "load a"]
        assert told(pool.loaded("a", 5)) == ["grant a #3"]

    def test_unload_of_what_is_loading_lets_those_in_who_asked_before(self):
        pool = pool_of("a")
        first = Ticket("a", "use")
        pool.ask(first, 0)
        pool.ask(Ticket("a", "unload"), 0)
        assert told(pool.loaded("a", 1)) == ["grant a #1", "drain a"]
        assert told(pool.leave(first, 2)) == ["unload a"]

    def test_after_the_grace_nobody_is_waited_for(self):
        pool = pool_of("a")
        inside = use(pool, "a")
        pool.ask(Ticket("a", "unload", grace_s=5), 10)
        assert pool.next_time == 15
        assert told(pool.tick(15)) == ["unload a"]
        assert told(pool.leave(inside, 16)) == []
        assert told(pool.unloaded("a", 17)) == ["grant a #2"]

    def test_a_model_stays_when_nobody_wants_it_gone_any_more(self):
        pool = pool_of("ab", max_loaded=1)
        use(pool, "a")
        wishes = [Ticket("b", "swap", grace_s=5), Ticket("a", "unload", grace_s=9)]
        assert told(pool.ask(wishes[0], 1)) == ["drain a"]
        assert told(pool.ask(wishes[1], 1)) == []
        assert pool.next_time == 6
        assert told(pool.leave(wishes[0], 2)) == []
        assert pool.next_time == 10
        assert told(pool.leave(wishes[1], 3)) == ["stay a"]
        assert told(pool.ask(Ticket("a", "use"), 4)) == ["grant a #4"]

    def test_closing_sends_everybody_home(self):
        pool = pool_of("abc", max_loaded=2)
        use(pool, "a")
        pool.ask(Ticket("b", "load"), 0)
        pool.ask(Ticket("c", "use"), 0)
        assert told(pool.close(1)) == ["refuse b #2", "refuse c #3", "unload a", "give_up b"]
        assert told(pool.loaded("b", 2)) == ["unload b"]
        pool.unloaded("a", 3)
        assert not pool.is_empty
        pool.unloaded("b", 3)
        assert pool.is_empty
        assert isinstance(refusal(pool.ask(Ticket("a", "use"), 4)), ModelNotLoadedError)


class TestBudgets:
    def test_each_device_has_its_own(self):
        pool = Pool(max_bytes=gib(cpu=8, CUDA0=4))
        pool.register(Member("card", gib(CUDA0=3, cpu=1)))
        pool.register(Member("main", gib(cpu=6)))
        pool.register(Member("both", gib(CUDA0=2, cpu=3)))
        visit(pool, "card", 0)
        visit(pool, "main", 1)
        assert told(pool.ask(Ticket("both", "use"), 2)) == ["unload card", "unload main"]

    def test_who_holds_nothing_where_it_is_short_stays(self):
        pool = Pool(max_bytes=gib(cpu=8, CUDA0=4))
        pool.register(Member("old", gib(cpu=4)))
        pool.register(Member("card", gib(CUDA0=3)))
        pool.register(Member("next", gib(CUDA0=3, cpu=1)))
        visit(pool, "old", 0)
        visit(pool, "card", 1)
        assert told(pool.ask(Ticket("next", "use"), 2)) == ["unload card"]

    def test_a_refusal_names_the_device_that_is_short(self):
        pool = Pool(max_bytes=gib(cpu=8, CUDA0=4))
        pool.register(Member("card", gib(CUDA0=3, cpu=1), is_pinned=True))
        pool.register(Member("next", gib(CUDA0=2, cpu=1)))
        visit(pool, "card", 0)
        error = refusal(pool.ask(Ticket("next", "use"), 1))
        assert isinstance(error, NoRoomError)
        assert error.message == (
            "`next` needs 2.0 GiB on CUDA0; 1.0 GiB of the 4.0 GiB of `max_bytes` are free, and"
            " what could leave is pinned: `card` (3.0 GiB)"
        )
        assert (error.needed, error.free) == (2 * GIB, GIB)

    def test_a_device_without_a_budget_is_not_bounded(self):
        pool = Pool(max_bytes=gib(CUDA0=4))
        for name in "ab":
            pool.register(Member(name, gib(cpu=100)))
        visit(pool, "a", 0)
        assert told(pool.ask(Ticket("b", "use"), 1)) == ["load b"]

    def test_bytes_of_which_nobody_says_where_count_on_each(self):
        pool = Pool(max_bytes=gib(cpu=8, CUDA0=4))
        pool.register(Member("told", gib(cpu=1, CUDA0=2)))
        pool.register(Member("untold", {ANYWHERE: 3 * GIB}))
        visit(pool, "told", 0)
        assert told(pool.ask(Ticket("untold", "use"), 1)) == ["unload told"]

    def test_memory_that_is_short_on_one_device_cannot_come_from_another(self):
        pool = Pool()
        pool.register(Member("main", gib(cpu=9)))
        pool.register(Member("next", gib(CUDA0=3)))
        visit(pool, "main", 0)
        pool.ask(Ticket("next", "use"), 1)
        short = OutOfMemoryError("no", needed=3 * GIB, free=2 * GIB, device="CUDA0")
        assert told(pool.failed("next", short, 2)) == ["refuse next #2"]


class TestSwapping:
    def test_when_both_fit_the_next_is_loaded_while_the_old_one_serves(self):
        pool = pool_of("ab", max_loaded=2)
        inside = use(pool, "a")
        assert told(pool.ask(Ticket("b", "swap"), 1)) == ["load b"]
        late = Ticket("a", "use")
        assert told(pool.ask(late, 2)) == ["grant a #3"]
        assert told(pool.loaded("b", 3)) == ["drain a"]
        assert pool.default == "b"
        assert told(pool.ask(Ticket("b", "use"), 4)) == ["grant b #4"]
        assert told(pool.leave(inside, 5)) == []
        assert told(pool.leave(late, 6)) == ["unload a"]
        assert told(pool.unloaded("a", 7)) == ["grant b #2"]

    def test_when_they_do_not_fit_the_next_is_loaded_afterwards(self):
        pool = pool_of("ab", max_bytes=5, a=3, b=4)
        inside = use(pool, "a")
        assert told(pool.ask(Ticket("b", "swap"), 1)) == ["drain a"]
        assert told(pool.leave(inside, 2)) == ["unload a"]
        assert told(pool.unloaded("a", 3)) == ["load b"]
        assert told(pool.loaded("b", 4)) == ["grant b #2"]
        assert states(pool) == {"a": "unloaded", "b": "loaded"}

    def test_the_default_of_before_leaves_rather_than_an_older_one(self):
        pool = pool_of("abc", max_loaded=2)
        visit(pool, "b", 0)
        visit(pool, "a", 1)
        assert told(pool.ask(Ticket("c", "swap"), 2)) == ["unload a"]

    def test_a_grace_bounds_the_wait(self):
        pool = pool_of("ab", max_loaded=1)
        use(pool, "a")
        assert told(pool.ask(Ticket("b", "swap", grace_s=3), 1)) == ["drain a"]
        assert pool.next_time == 4
        assert told(pool.tick(4)) == ["unload a"]
        assert told(pool.unloaded("a", 5)) == ["load b"]

    def test_a_pinned_default_stays(self):
        pool = pool_of("ab", max_loaded=2)
        pool.members["a"].is_pinned = True
        visit(pool, "a", 0)
        pool.ask(Ticket("b", "swap"), 1)
        assert told(pool.loaded("b", 2)) == ["grant b #2"]
        assert states(pool) == {"a": "loaded", "b": "loaded"}

    def test_a_swap_to_what_is_loaded_only_unloads(self):
        pool = pool_of("ab", max_loaded=2)
        visit(pool, "a", 0)
        visit(pool, "b", 1)
        assert told(pool.ask(Ticket("b", "swap"), 2)) == ["unload a"]
        assert told(pool.unloaded("a", 3)) == ["grant b #3"]
        assert told(pool.ask(Ticket("b", "swap"), 4)) == ["grant b #4"]

    def test_a_swap_that_fails_leaves_the_old_one_where_it_was(self):
        """K07"""
        pool = pool_of("ab", max_loaded=2)
        visit(pool, "a", 0)
        pool.ask(Ticket("b", "swap"), 1)
        assert str(refusal(pool.failed("b", ValueError("bad"), 2))) == "bad"
        assert (pool.default, states(pool)["a"]) == ("a", "loaded")

    def test_a_swap_that_fails_brings_the_old_one_back(self):
        """K07"""
        pool = pool_of("ab", max_loaded=1)
        visit(pool, "a", 0)
        assert told(pool.ask(Ticket("b", "swap"), 1)) == ["unload a"]
        assert told(pool.unloaded("a", 2)) == ["load b"]
        assert told(pool.failed("b", ValueError("bad"), 3)) == ["refuse b #2", "load a"]
        assert told(pool.loaded("a", 4)) == ["grant a #2"]
        assert pool.default == "a"

    def test_a_swap_that_fails_loads_nothing_that_was_not_there(self):
        pool = pool_of("ab", max_loaded=1)
        pool.ask(Ticket("b", "swap"), 1)
        assert told(pool.failed("b", ValueError("bad"), 3)) == ["refuse b #1"]


class TestFailing:
    def test_everybody_who_waits_for_a_load_hears_of_its_failure_once(self):
        pool = pool_of("ab")
        for name in "aba":
            pool.ask(Ticket(name, "use"), 0)
        error = ValueError("bad")
        orders = pool.failed("a", error, 1)
        assert told(orders) == ["refuse a #1", "refuse a #3"]
        assert all(order.error is not error for order in orders)
        assert told(pool.ask(Ticket("a", "use"), 2)) == ["load a"]

    def test_a_load_that_nobody_waits_for_is_given_up(self):
        """X05"""
        pool = pool_of("a")
        tickets = [Ticket("a", "use") for _ in range(2)]
        for ticket in tickets:
            pool.ask(ticket, 0)
        assert told(pool.leave(tickets[0], 1)) == []
        assert told(pool.leave(tickets[1], 1)) == ["give_up a"]
        assert told(pool.failed("a", ValueError("given up"), 2)) == []
        assert told(pool.leave(tickets[1], 3)) == []

    def test_a_load_that_was_given_up_too_early_is_begun_again(self):
        pool = pool_of("a")
        first = Ticket("a", "use")
        pool.ask(first, 0)
        pool.leave(first, 1)
        assert told(pool.ask(Ticket("a", "use"), 2)) == []
        assert told(pool.failed("a", ValueError("given up"), 3)) == ["load a"]
        assert told(pool.loaded("a", 4)) == ["grant a #2"]

    def test_where_memory_is_short_something_leaves_and_it_is_tried_again(self):
        pool = pool_of("abc")
        visit(pool, "a", 0)
        visit(pool, "b", 1)
        short = OutOfMemoryError("`c` needs 3 GiB and 2 is free", needed=3 * GIB, free=2 * GIB)
        pool.ask(Ticket("c", "use"), 2)
        assert told(pool.failed("c", short, 3)) == ["unload a"]
        assert told(pool.unloaded("a", 4)) == ["load c"]
        assert told(pool.failed("c", short, 5)) == ["unload b"]
        assert told(pool.unloaded("b", 6)) == ["load c"]
        assert refusal(pool.failed("c", short, 7)).args == short.args
        assert told(pool.ask(Ticket("c", "use"), 8)) == ["load c"]

    def test_a_context_that_finds_no_memory_is_a_shortage_and_any_other_is_not(self):
        pool = pool_of("ab")
        visit(pool, "a", 0)
        pool.ask(Ticket("b", "use"), 1)
        assert refusal(pool.failed("b", ContextTooSmallError("it has no such heads"), 2))
        pool.ask(Ticket("b", "use"), 3)
        assert told(pool.failed("b", ContextTooSmallError("failed to allocate 3 GB"), 4)) == [
            "unload a"
        ]
        assert told(pool.unloaded("a", 5)) == ["load b"]

    def test_where_memory_is_much_too_short_nothing_leaves_in_vain(self):
        pool = pool_of("ab")
        visit(pool, "a", 0)
        pool.ask(Ticket("b", "use"), 1)
        short = OutOfMemoryError("`b` needs 9 GiB", needed=9 * GIB, free=2 * GIB)
        assert refusal(pool.failed("b", short, 2)).args == short.args
        assert states(pool)["a"] == "loaded"

    def test_where_memory_is_short_because_of_the_pinned_the_error_says_so(self):
        pool = pool_of("ab")
        pool.members["a"].is_pinned = True
        visit(pool, "a", 0)
        pool.ask(Ticket("b", "use"), 1)
        short = OutOfMemoryError("`b` needs 3 and 2 is free", needed=3, free=2)
        error = refusal(pool.failed("b", short, 2))
        assert isinstance(error, NoRoomError)
        assert error.message == (
            "`b` needs 1.0 GiB; `b` needs 3 and 2 is free, and what could leave is pinned:"
            " `a` (1.0 GiB)"
        )

    def test_what_its_user_closed_himself_is_loaded_again(self):
        pool = pool_of("a")
        visit(pool, "a", 0)
        assert told(pool.unloaded("a", 1)) == []
        assert told(pool.ask(Ticket("a", "use"), 2)) == ["load a"]


class World:
    """Everything a pool can be told, by dice; and what must hold all the time."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.max_loaded = self.dice.choice([1, 2, 3])
        self.max_bytes = self.dice.choice([8 * GIB, gib(cpu=8, CUDA0=8)])
        self.pool = Pool(self.max_loaded, self.max_bytes)
        for name in "abcde":
            keep_alive_s = self.dice.choice([0, 5, inf])
            priority = self.dice.choice(["high", "normal", "low"])
            on_card = self.dice.randint(0, 8)
            needs = gib(CUDA0=on_card, cpu=self.dice.randint(0, 8 - on_card))
            self.pool.register(Member(name, needs, priority, keep_alive_s))
        self.now = 0.0
        self.todo: list[Order] = []
        self.waiting: set[Ticket] = set()
        self.inside: set[Ticket] = set()
        self.running: set[str] = set()

    def step(self, is_ending: bool) -> None:
        self.now += self.dice.random() * 3
        choices = [self.finish] * 4 + [self.go_on] * 2 + [self.turn]
        if not is_ending:
            choices += [self.arrive] * 4 + [self.give_up]
        self.hear(self.dice.choice(choices)())
        while self.pool.next_time <= self.now:
            self.hear(self.pool.tick(self.now))
        self.check()

    def arrive(self) -> list[Order]:
        wish: Any = self.dice.choice(["use"] * 8 + ["load", "swap", "unload"])
        grace_s = self.dice.choice([inf, 0.0, 4.0])
        ticket = Ticket(self.dice.choice("abcde"), wish, grace_s=grace_s)
        self.waiting.add(ticket)
        return self.pool.ask(ticket, self.now)

    def give_up(self) -> list[Order]:
        if not self.waiting:
            return []
        ticket = self.dice.choice(sorted(self.waiting, key=lambda each: each.number))
        self.waiting.remove(ticket)
        return self.pool.leave(ticket, self.now)

    def go_on(self) -> list[Order]:
        """Somebody who is inside goes."""
        if not self.inside:
            return []
        ticket = min(self.inside, key=lambda each: each.number)
        self.inside.remove(ticket)
        return self.pool.leave(ticket, self.now)

    def turn(self) -> list[Order]:
        name = self.dice.choice("abcde")
        is_loaded = self.pool.members[name].state == "loaded"
        if name not in self.running and not is_loaded:
            return []
        self.running ^= {name}
        return self.pool.running(name, name in self.running, self.now)

    def finish(self) -> list[Order]:
        """Something that was ordered is done."""
        if not self.todo:
            return []
        order = self.todo.pop(0)
        if order.verb == "unload":
            self.running.discard(order.model)
            return self.pool.unloaded(order.model, self.now)
        if self.dice.random() < 0.1:
            kind = self.dice.choice([ValueError, MemoryError])
            return self.pool.failed(order.model, kind("no"), self.now)
        return self.pool.loaded(order.model, self.now)

    def hear(self, orders: list[Order]) -> None:
        for order in orders:
            if order.verb in ("load", "unload"):
                assert order.model not in [other.model for other in self.todo]
                self.todo.append(order)
            elif order.ticket is not None and order.ticket in self.waiting:
                self.waiting.remove(order.ticket)
                if order.verb == "grant" and order.ticket.wish == "use":
                    assert self.pool.members[order.model].state not in ("unloaded", "loading")
                    self.inside.add(order.ticket)

    def check(self) -> None:
        present = [m for m in self.pool.members.values() if m.state != "unloaded"]
        assert len(present) <= self.max_loaded
        for device in ("cpu", "CUDA0"):
            limit = self.max_bytes if isinstance(self.max_bytes, int) else self.max_bytes[device]
            assert sum(member.needs[device] for member in present) <= limit
        if isinstance(self.max_bytes, int):
            assert sum(sum(member.needs.values()) for member in present) <= self.max_bytes


@pytest.mark.parametrize("seed", range(60))
def test_nobody_is_lost_whatever_happens(seed: int):
    world = World(seed)
    for _ in range(300):
        world.step(is_ending=False)
    for _ in range(3000):
        world.step(is_ending=True)
        if not (world.waiting or world.inside or world.todo or world.running):
            break
    assert (world.waiting, world.inside, world.todo, world.running) == (set(), set(), [], set())


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        *(
            ("5m", 300),
            ("1h30m", 5400),
            ("90s", 90),
            ("500ms", 0.5),
            ("1.5h", 5400),
            ("2d", 172800),
        ),
        *((0, 0), ("0", 0), (2.5, 2.5), ("30", 30), (-1, inf), ("-1", inf)),
        (timedelta(minutes=2), 120),
    ],
)
def test_durations_are_seconds_or_text(given: Any, seconds: float):
    assert seconds_of("keep_alive", given) == seconds


@pytest.mark.parametrize(
    "given",
    ["", "m", "5 m", "5x", "-5m", "1e3", "9" * 500, -2, 1e12, float("nan"), inf, True, None, b"5m"],
)
def test_other_durations_are_refused(given: Any):
    with pytest.raises(
        InvalidRequestError, match="`keep_alive` must be seconds, or text"
    ) as raised:
        seconds_of("keep_alive", given)
    assert raised.value.name == "keep_alive"


@pytest.mark.parametrize("kind", [ModelManager, AsyncModelManager])
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_loaded": 0}, "max_loaded"),
        ({"max_loaded": True}, "max_loaded"),
        ({"max_bytes": "6GiB"}, "max_bytes"),
        ({"max_bytes": {"cpu": -1}}, "max_bytes"),
        ({"max_bytes": {"": 1}}, "max_bytes"),
        ({"max_bytes": {0: 1}}, "max_bytes"),
        ({"keep_alive": "soon"}, "keep_alive"),
        ({"queue_size": 0}, "queue_size"),
        ({"snapshots": "cloud"}, "snapshots"),
        ({"on_event": 3}, "on_event"),
    ],
)
def test_a_manager_refuses_what_makes_no_sense(kind: Any, fields: dict[str, Any], name: str):
    with pytest.raises(InvalidRequestError) as raised:
        kind(**fields)
    assert raised.value.name == name


@pytest.mark.parametrize(
    ("args", "fields", "name"),
    [
        (("",), {}, "name"),
        (("a\nb",), {}, "name"),
        ((7,), {}, "name"),
        (("a", 7), {}, "model_path"),
        (("a", None, 7), {}, "config"),
        (("a", ModelConfig(), ModelConfig()), {}, "config"),
        (("a", "b.gguf"), {"model_path": "c.gguf"}, "model_path"),
        (("a",), {"priority": "urgent"}, "priority"),
        (("a",), {"keep_alive": "5 minutes"}, "keep_alive"),
        (("a",), {"n_ctx": 1}, "n_ctx"),
    ],
)
def test_what_cannot_be_registered_is_refused(args: Any, fields: dict[str, Any], name: str):
    with ModelManager(max_loaded=1) as models:
        with pytest.raises(InvalidRequestError) as raised:
            models.register_model(*args, **fields)
        assert raised.value.name == name
        assert models.list_models() == []


def test_a_name_that_nobody_registered_is_not_found():
    with ModelManager(max_loaded=1) as models:
        with pytest.raises(ModelNotFoundError, match="no model is registered"):
            models.load_model()
        models.register_model("small", keep_alive="5m")
        with pytest.raises(ModelNotFoundError, match="Model not found: large") as raised:
            models.load_model("large")
        assert raised.value.hint == "registered are `small`"
        with pytest.raises(ModelNotLoadedError, match="`small` is not loaded"):
            models.get_model()
        assert models.usage("small").requests == 0
        (described,) = models.list_models()
        assert (described.name, described.state, described.keep_alive_s) == (
            "small",
            "unloaded",
            300,
        )
        assert (described.is_default, models.default_model) == (True, "small")


def test_without_arguments_there_is_one_manager_for_the_process():
    first = ModelManager()
    assert ModelManager() is first
    assert ModelManager(max_loaded=3) is not first
    assert AsyncModelManager() is not first
    first.close()
    second = ModelManager()
    assert second is not first
    second.close()


def test_a_closed_manager_says_so():
    models = ModelManager(max_loaded=1)
    models.register_model("small")
    models.close()
    models.close()
    assert models.is_closed
    for ask in (models.load_model, models.unload_model, lambda: models.register_model("other")):
        with pytest.raises(ModelNotLoadedError, match="the manager was closed"):
            ask()


def test_both_managers_have_the_same_methods_with_the_same_arguments():
    import inspect

    def methods(kind: type) -> dict[str, list[str]]:
        found = [name for name in dir(kind) if not name.startswith("_")]
        return {
            name: list(inspect.signature(getattr(kind, name)).parameters)
            for name in found
            if callable(getattr(kind, name))
        }

    assert methods(ModelManager) == methods(AsyncModelManager)
