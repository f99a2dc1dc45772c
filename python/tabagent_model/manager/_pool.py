"""Which models are loaded, who waits for one, who goes next, and what has to leave for that.

    unloaded ──▶ loading ──▶ loaded ──▶ draining ──▶ unloading ──▶ unloaded
                                        nobody new; who is inside finishes, or the grace ends

These are rules only: no threads, no clock, no llama.cpp. Whoever owns a pool tells it what happened
and when, and carries out the orders that come back; what comes of them has happened in turn.

Whoever wants a loaded model is served at once, also past others who wait for another one: A B A
becomes A A B, and A is loaded once. But after `PATIENCE` such times the room is cleared for B.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from itertools import count
from math import inf
from typing import Literal, NamedTuple

from ..errors import (
    ContextTooSmallError,
    ModelBusyError,
    ModelNotLoadedError,
    NoRoomError,
    QueueFullError,
)
from ..params import Priority

State = Literal["unloaded", "loading", "loaded", "draining", "unloading"]
Wish = Literal["use", "load", "swap", "unload"]

PRIORITIES: tuple[Priority, ...] = ("high", "normal", "low")

Needs = Mapping[str, int]
"""Bytes by device."""
ANYWHERE = ""
"""The device of bytes of which nobody says where they are needed: they count everywhere."""

# As in the engine's own queue: whoever was passed over so often is next.
PATIENCE = 8


def taken(needs: Needs, device: str | None) -> int:
    """On one device, or on all together."""
    if device is None:
        return sum(needs.values())
    return needs.get(device, 0) + needs.get(ANYWHERE, 0)


@dataclass(eq=False)
class Ticket:
    """What somebody waits for. A granted `use` holds its model until it is handed back."""

    model: str
    wish: Wish
    owner: Hashable = None
    """Who asks: nobody can wait for what he holds himself."""
    grace_s: float = inf
    """How long those are waited for who use what has to leave."""
    needs: Needs | None = None
    """If that was found out anew."""
    keep_alive_s: float | None = None
    """Of the model from then on, if that is wished."""
    number: int = 0
    ends_at: float = inf
    passed_over: int = 0
    replaced: str | None = None
    """The default of before, which left for this swap."""

    @property
    def is_due(self) -> bool:
        return self.passed_over >= PATIENCE


@dataclass(eq=False)
class Member:
    """A model that the pool knows by name."""

    name: str
    needs: Needs = field(default_factory=dict)
    priority: Priority = "normal"
    keep_alive_s: float = inf
    is_pinned: bool = False
    state: State = "unloaded"
    users: list[Ticket] = field(default_factory=list)
    is_running: bool = False
    """Requests run in it, whether somebody holds a ticket for them or not."""
    was_used: bool = False
    used_at: float = 0.0
    leaves_for: list[Ticket] = field(default_factory=list)
    """Because of whom it is draining. If they all lose interest, it stays."""
    is_given_up: bool = False
    """Nobody waits any more for the load that is under way."""
    crowd: frozenset[str] = frozenset()
    """Beside these the memory was not enough, and the error that said so."""
    shortage: Exception | None = None

    @property
    def is_busy(self) -> bool:
        return self.is_running or bool(self.users)

    @property
    def leaves_at(self) -> float:
        """When the first of those who want it gone will wait no longer."""
        return min((ticket.ends_at for ticket in self.leaves_for), default=inf)


class Order(NamedTuple):
    """What is to be done."""

    verb: Literal["load", "give_up", "drain", "stay", "unload", "grant", "refuse"]
    model: str
    ticket: Ticket | None = None
    error: Exception | None = None


class Pool:
    """Models that share a number of places, and of bytes: of all devices together, or of each."""

    def __init__(
        self,
        max_loaded: float = inf,
        max_bytes: float | Needs = inf,
        queue_size: float = inf,
    ) -> None:
        self.members: dict[str, Member] = {}
        self.default: str | None = None
        self.is_closed = False
        self._max_loaded = max_loaded
        self._budgets: dict[str | None, float] = {}
        if isinstance(max_bytes, Mapping):
            self._budgets.update(max_bytes)
        else:
            self._budgets[None] = max_bytes
        self._queue_size = queue_size
        self._waiting: dict[Ticket, None] = {}
        self._numbers = count(1)
        self._orders: list[Order] = []
        self._now = 0.0

    def register(self, member: Member, is_default: bool = False) -> None:
        if self.is_closed:
            raise _closed()
        self.members[member.name] = member
        if is_default or self.default is None:
            self.default = member.name

    def ask(self, ticket: Ticket, now: float) -> list[Order]:
        """Somebody wants a model, or wants it gone."""
        ticket.number, ticket.ends_at = next(self._numbers), now + ticket.grace_s
        if (refusal := self._refusal(ticket)) is not None:
            return [Order("refuse", ticket.model, ticket, refusal)]
        member = self.members[ticket.model]
        if ticket.needs is not None and member.state == "unloaded":
            member.needs = ticket.needs
        self._waiting[ticket] = None
        return self._advance(now)

    def leave(self, ticket: Ticket, now: float) -> list[Order]:
        """Somebody waits no longer, or hands a model back. To do that twice changes nothing."""
        member = self.members[ticket.model]
        if ticket in self._waiting:
            self._forget(ticket)
            if member.state == "loading" and not self._is_awaited(member):
                self._give_up(member)
        elif ticket in member.users:
            member.users.remove(ticket)
            member.used_at = now
        return self._advance(now)

    def running(
        self, name: str, is_running: bool, now: float, was_used: bool = False
    ) -> list[Order]:
        """The first request began to run in a model, or the last one ended. One that was quicker
        than this news `was_used` only."""
        member = self.members[name]
        member.was_used |= is_running or was_used
        if is_running and not member.is_running:
            self._pass_over(name, inf)
        if member.state in ("loaded", "draining"):  # what is said of one that is gone comes late
            member.is_running, member.used_at = is_running, now
        return self._advance(now)

    def loaded(self, name: str, now: float) -> list[Order]:
        member = self.members[name]
        member.state, member.used_at, member.was_used = "loaded", now, False
        member.is_given_up, member.crowd, member.shortage = False, frozenset(), None
        if self.is_closed:
            self._unload(member)
        return self._advance(now)

    def weighed(self, name: str, needs: Needs, now: float) -> list[Order]:
        """What a model really takes turned out after it was loaded."""
        self.members[name].needs = needs
        return self._advance(now)

    def failed(self, name: str, error: Exception, now: float) -> list[Order]:
        """A load came to nothing. Where memory was short, something is unloaded and it is tried
        again; and what left for a swap comes back."""
        member = self.members[name]
        member.state, self._now = "unloaded", now
        if not member.is_given_up and _is_shortage(error) and self._may_help(error):
            member.crowd = frozenset(other.name for other in self._present())
            member.shortage = error
        elif not member.is_given_up:  # given up, and wanted again since: then it is just repeated
            self._refuse(member, error)
        member.is_given_up = False
        return self._advance(now)

    def unloaded(self, name: str, now: float) -> list[Order]:
        """A model is gone: as ordered, or because its owner closed it himself."""
        member = self.members[name]
        member.state, member.is_running = "unloaded", False
        member.users.clear()
        return self._advance(now)

    def tick(self, now: float) -> list[Order]:
        """Time has passed, or a setting was changed."""
        return self._advance(now)

    def close(self, now: float) -> list[Order]:
        """Everybody is sent home and everything unloaded, whoever uses it."""
        self.is_closed = True
        for ticket in list(self._waiting):
            self._send_home(ticket, _closed())
        for member in self._present():
            if member.state == "loading":
                self._give_up(member)
            else:
                self._unload(member)
        return self._advance(now)

    @property
    def next_time(self) -> float:
        """When `tick` is wanted, if nothing happens before."""
        return min(map(self._end_of, self.members.values()), default=inf)

    @property
    def is_empty(self) -> bool:
        return not self._present()

    def num_waiting(self, name: str) -> int:
        waiting = list(self._waiting)  # other threads look on
        return sum(ticket.model == name for ticket in waiting)

    def _advance(self, now: float) -> list[Order]:
        self._now, num_orders = now, -1
        while num_orders < len(self._orders):  # one thing may lead to another
            num_orders = len(self._orders)
            self._serve()
            self._see_off()
            self._fill()
        orders, self._orders = self._orders, []
        return orders

    def _serve(self) -> None:
        """Grant what can be granted as things are."""
        for ticket in self._in_order():
            member = self.members[ticket.model]
            if ticket not in self._waiting:
                continue
            if ticket.wish == "unload":
                if member.state == "unloaded":
                    self._grant(ticket)
                else:
                    self._drain(member, ticket)
            elif self._is_open(member, ticket) and (
                ticket.wish != "swap" or self._took_over(ticket)
            ):
                self._grant(ticket)

    def _see_off(self) -> None:
        """Unload what is empty and has to leave, and what has to be gone by now."""
        for member in self._present():
            is_out = member.state == "draining" and not member.is_busy
            if is_out or self._now >= self._end_of(member):
                self._unload(member)

    def _fill(self) -> None:
        """Load what is waited for. Behind one who must wait for room nobody may take it away."""
        for ticket in self._in_order():
            member = self.members[ticket.model]
            if ticket in self._waiting and ticket.wish != "unload" and member.state == "unloaded":
                self._make_room(ticket)
                if ticket in self._waiting and member.state == "unloaded":
                    return

    def _make_room(self, ticket: Ticket) -> None:
        """Load the model of a ticket, or unload something for it, or see that it has to wait."""
        member = self.members[ticket.model]
        if self._fits(member):
            member.state = "loading"
            self._orders.append(Order("load", member.name))
            return
        going = self._present("unloading")
        if self._fits(member, going):
            return
        stay = [other for other in self._present("loaded") if not other.is_pinned]
        idle = [other for other in stay if not (other.is_busy or self._is_awaited(other))]
        if ticket.wish != "swap" and (victims := self._victims(ticket, going, idle)) is not None:
            for victim in victims:
                self._unload(victim)
        else:
            self._wait_for_room(ticket, going + self._present("draining"), stay)

    def _wait_for_room(self, ticket: Ticket, going: list[Member], stay: list[Member]) -> None:
        """Where those inside are in the way: let nobody else in, if it is time for that."""
        member = self.members[ticket.model]
        victims = self._victims(ticket, going, stay)
        if victims is None:
            if all(other.is_pinned for other in self._present("loading")):
                self._refuse(member, self._no_room(member))
        elif not self._fits(member, [o for o in going + victims if not self._holds(ticket, o)]):
            self._send_home(ticket, _waits_for_itself(ticket, going + victims))
        elif ticket.is_due or ticket.wish == "swap":
            for other in going + victims:
                if other.name == self.default and ticket.wish == "swap":
                    ticket.replaced = other.name
                self._drain(other, ticket)

    def _victims(
        self, ticket: Ticket, going: list[Member], candidates: list[Member]
    ) -> list[Member] | None:
        """Who would have to leave beside those who are going; None if all are not enough.

        For a swap the default of before goes first; then who is idle, less urgent, longer unused.
        """
        member = self.members[ticket.model]

        def reluctance(other: Member) -> tuple[bool, bool, bool, int, float]:
            is_spared = ticket.wish != "swap" or other.name != self.default
            is_wanted = other.is_busy or self._is_awaited(other)
            held = self._holds(ticket, other)
            return held, is_spared, is_wanted, -PRIORITIES.index(other.priority), other.used_at

        victims: list[Member] = []
        for other in sorted(candidates, key=reluctance):
            if not self._fits(member, going + victims):
                victims.append(other)
        if not self._fits(member, going + victims):
            return None
        for victim in list(victims):  # a large one may have made the small ones before it needless
            rest = [other for other in victims if other is not victim]
            if self._fits(member, going + rest):
                victims = rest
        return victims

    def _took_over(self, ticket: Ticket) -> bool:
        """Whether a swap is complete: its model is the default, and the one of before is gone."""
        if self.default != ticket.model:
            ticket.replaced, self.default = self.default, ticket.model
            before = self.members.get(ticket.replaced or "")
            if before is not None and not before.is_pinned:
                self._drain(before, ticket)
        before = self.members.get(ticket.replaced or "")
        return before is None or before.state not in ("draining", "unloading")

    def _grant(self, ticket: Ticket) -> None:
        member = self.members[ticket.model]
        self._forget(ticket)
        self._orders.append(Order("grant", member.name, ticket))
        if ticket.wish == "use":
            member.users.append(ticket)
            member.was_used = True
        if ticket.keep_alive_s is not None:
            member.keep_alive_s = ticket.keep_alive_s
        if ticket.wish != "unload":
            member.used_at = self._now
            self._pass_over(member.name, ticket.number)

    def _pass_over(self, name: str, number: float) -> None:
        """Somebody was served past those who came before him and wait for room."""
        for other in list(self._waiting):
            waits = self.members[other.model].state == "unloaded" and other.wish != "unload"
            if waits and other.model != name and other.number < number:
                other.passed_over += 1
                if other.passed_over == PATIENCE:
                    self._make_room(other)

    def _drain(self, member: Member, ticket: Ticket) -> None:
        """Let nobody in any more, and unload when everybody is out."""
        if member.state == "loaded" and member.is_busy:
            member.state = "draining"
            self._orders.append(Order("drain", member.name))
        elif member.state == "loaded":
            self._unload(member)
        if member.state == "draining" and ticket not in member.leaves_for:
            member.leaves_for.append(ticket)

    def _unload(self, member: Member) -> None:
        if member.state in ("loaded", "draining"):
            member.state = "unloading"
            member.leaves_for.clear()
            self._orders.append(Order("unload", member.name))

    def _give_up(self, member: Member) -> None:
        member.is_given_up = True
        self._orders.append(Order("give_up", member.name))

    def _refuse(self, member: Member, error: Exception) -> None:
        """Tell everybody who waits for a model that it will not come."""
        member.crowd, member.shortage = frozenset(), None
        for ticket in [each for each in self._waiting if each.model == member.name]:
            if ticket.wish == "unload":
                continue
            self._send_home(ticket, _copied(error))
            if ticket.replaced is not None:
                self._waiting[Ticket(ticket.replaced, "load", number=ticket.number)] = None

    def _send_home(self, ticket: Ticket, error: Exception) -> None:
        self._forget(ticket)
        self._orders.append(Order("refuse", ticket.model, ticket, error))

    def _forget(self, ticket: Ticket) -> None:
        """Somebody waits no longer, and nothing has to leave for him."""
        del self._waiting[ticket]
        for member in self._present("draining"):
            if ticket in member.leaves_for:
                member.leaves_for.remove(ticket)
                if not member.leaves_for:
                    member.state = "loaded"
                    self._orders.append(Order("stay", member.name))

    def _refusal(self, ticket: Ticket) -> Exception | None:
        """What is wrong with a wish from the beginning."""
        if self.is_closed:
            return _closed()
        if len(self._waiting) >= self._queue_size:
            return QueueFullError(f"{len(self._waiting)} callers wait for models already")
        leaves = {"unload": ticket.model, "swap": self.default}.get(ticket.wish)
        member = self.members.get(leaves or "")
        if member is None or (ticket.wish == "swap" and leaves == ticket.model):
            return None
        if self._holds(ticket, member) and not member.is_pinned:
            return _waits_for_itself(ticket, [member])
        return None

    def _fits(self, member: Member, gone: Collection[Member] = ()) -> bool:
        stay = [other for other in self._present() if other is not member and other not in gone]
        is_crowded = bool(member.crowd) and member.crowd <= {other.name for other in stay}
        return not is_crowded and len(stay) < self._max_loaded and not self._short(member, stay)

    def _short(self, member: Member, stay: Iterable[Member]) -> list[str | None]:
        """The budgets that a model and those who stay exceed together."""
        together = [member, *stay]
        return [
            device
            for device, budget in self._budgets.items()
            if sum(taken(each.needs, device) for each in together) > budget
        ]

    def _may_help(self, shortage: Exception) -> bool:
        """Whether unloading something could give the memory that was missing."""
        missing = getattr(shortage, "needed", 1) - getattr(shortage, "free", 0)
        device, present = getattr(shortage, "device", None), self._present()
        return bool(present) and missing <= sum(taken(each.needs, device) for each in present)

    def _end_of(self, member: Member) -> float:
        """When a model has to be gone if nothing happens before."""
        if member.state == "draining":
            return member.leaves_at
        is_wanted = member.is_pinned or member.is_busy or self._is_awaited(member)
        if member.state != "loaded" or is_wanted:
            return inf
        if member.keep_alive_s == 0 and not member.was_used:
            return inf  # somebody had it loaded, and is about to use it
        return member.used_at + member.keep_alive_s

    def _holds(self, ticket: Ticket, member: Member) -> bool:
        """Whether somebody would wait for himself to let go of a model, and for ever."""
        if ticket.owner is None or ticket.grace_s < inf:
            return False
        return any(user.owner == ticket.owner for user in member.users)

    def _is_open(self, member: Member, ticket: Ticket) -> bool:
        """Whoever is inside may come in again: it does not become empty without him."""
        is_inside = member.state == "draining" and self._holds(ticket, member)
        return member.state == "loaded" or is_inside

    def _is_awaited(self, member: Member) -> bool:
        return any(t.model == member.name and t.wish != "unload" for t in self._waiting)

    def _present(self, *states: State) -> list[Member]:
        wanted = states or ("loading", "loaded", "draining", "unloading")
        return [member for member in self.members.values() if member.state in wanted]

    def _in_order(self) -> list[Ticket]:
        def rank(ticket: Ticket) -> tuple[bool, int, int]:
            urgency = PRIORITIES.index(self.members[ticket.model].priority)
            return not ticket.is_due, urgency, ticket.number

        return sorted(self._waiting, key=rank)

    def _no_room(self, member: Member) -> NoRoomError:
        stay = [other for other in self._present() if other is not member]
        pinned = [other for other in stay if other.is_pinned]
        device = next(iter(self._short(member, stay)), None)
        needed, budget = taken(member.needs, device), self._budgets.get(device, inf)
        free = max(budget - sum(taken(other.needs, device) for other in stay), 0)
        is_too_large, raised = needed > budget, "raise `max_bytes`"
        if member.shortage is not None:
            what, raised = str(getattr(member.shortage, "message", member.shortage)), "free memory"
            free = getattr(member.shortage, "free", free)
        elif len(stay) >= self._max_loaded:
            what, raised = f"all {self._max_loaded} places are taken", "raise `max_loaded`"
        else:
            of = f"{size(free)} of the {size(budget)} of `max_bytes`"
            what = f"{of} are free" if stay else f"`max_bytes` is {size(budget)}"
        message = f"`{member.name}` needs {size(needed)}{f' on {device}' if device else ''}; {what}"
        hint = f"{raised}, or lower its `n_ctx` or `max_parallel`"
        if pinned and not is_too_large:
            message += ", and what could leave is pinned: "
            message += ", ".join(
                f"`{other.name}` ({size(taken(other.needs, device))})" for other in pinned
            )
            hint = f"`unpin` one of them, or {raised}"
        names = tuple(other.name for other in pinned)
        facts = {"needed": needed, "free": None if free == inf else free, "pinned": names}
        return NoRoomError(message, hint=hint, **facts)


def size(num_bytes: float) -> str:
    """Bytes as people say them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:.0f} bytes"


def _is_shortage(error: Exception) -> bool:
    """For a context that it cannot make llama.cpp has one error, and words for what it lacked."""
    is_refused = isinstance(error, ContextTooSmallError) and "alloc" in str(error)
    return is_refused or isinstance(error, MemoryError)


def _copied(error: Exception) -> Exception:
    """Each gets his own: one that is raised again and again would grow its traceback."""
    try:
        return copy(error)
    except Exception:  # of a user's class
        return error


def _closed() -> ModelNotLoadedError:
    return ModelNotLoadedError("the manager was closed", hint="make another one")


def _waits_for_itself(ticket: Ticket, victims: Collection[Member]) -> ModelBusyError:
    held = next(v for v in victims if any(user.owner == ticket.owner for user in v.users))
    message = f"`{held.name}` would have to leave, and whoever asks for that is using it"
    return ModelBusyError(message, hint=f'leave its `with models.use("{held.name}")` before')
