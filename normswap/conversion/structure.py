"""Check what a trace shows: shapes, and BatchNorm left in any slot or any operator."""

from collections.abc import Callable, Iterable, Iterator

from normswap.conversion.checks import Check, Checks
from normswap.networks.network import Network
from normswap.networks.references import strays
from normswap.planning.choices import Action
from normswap.planning.entry import NormEntry
from normswap.planning.plan import Plan
from normswap.tracing.facts import Trace
from normswap.tracing.recorder import Shapes

AROUND = "its code may ask for what only BatchNorm has: leave that layer alone with exclude="
"""The way on with a network that looks at its norms."""

TEACH, LEAVE = "or teach it with normswap.register_norm", "or leave it alone with exclude="
"""Ways on with a norm that is not shown to be BatchNorm."""


def way_on(entry: NormEntry) -> str:
    """Return what else helps with a norm that stays, besides what its reason says."""
    return LEAVE if entry.is_turned else f"{TEACH}, {LEAVE}"


def structural_checks(converted: Network, plan: Plan, after: Trace, before: Trace | None) -> Checks:
    """Return the checks of a converted network's structure.

    Args:
        converted: The converted network.
        plan: What it was converted by.
        after: A trace of it.
        before: A trace of the network before conversion, where it is at hand.
    """
    functional = {*after.functional_norms, *(() if before is None else before.functional_norms)}
    return Checks((_same_shapes(plan, after, before), _no_batch_norm(converted, plan, sorted(functional))))


def left_behind(converted: Network) -> Iterator[Check]:
    """Yield a check that fails where a layer still is that another has taken the place of."""
    known = {id(conv.raw_weight): name for name, conv in converted.standardized()}
    for module, where in strays(converted.model):
        for parameter in module._parameters.values():
            if id(parameter) in known:
                what = f"{where} still runs {known[id(parameter)]} as it was, a {type(module).__name__}"
                yield Check("no layer left behind", False, f"{what}; take it off or convert again")


def _same_shapes(plan: Plan, after: Trace, before: Trace | None) -> Check:
    name = "shapes"
    if before is None:
        return _planned_shapes(plan, after)
    given_up = _inside_norms(plan)
    if gone := [module for module in before.shapes if module not in after.shapes and not given_up(module)]:
        why = (
            after.stopped_by or "the forward pass goes another way, as one does that asks whether a layer is BatchNorm"
        )
        return Check(name, False, f"{gone[0] or 'the network'} ran before and does not any more ({why}); {AROUND}")
    for module, shapes in before.shapes.items():
        if after.shapes.get(module, shapes) != shapes:
            return Check(name, False, f"{module or 'the network'}: {shapes} became {after.shapes[module]}")
    return Check(name, True, f"{len(before.shapes)} module outputs keep their shape")


def _inside_norms(plan: Plan) -> Callable[[str], bool]:
    """Return a function that tells whether a module was a part of a replaced norm and none that goes on running."""
    replaced = {f"{entry.name}.".lstrip("."): entry.then for entry in plan.norms if entry.changes}
    start = tuple(replaced)

    def inside(name: str) -> bool:
        owner = next((prefix for prefix in start if name.startswith(prefix)), None) if name.startswith(start) else None
        return owner is not None and name.removeprefix(owner).partition(".")[0] not in replaced[owner]

    return inside


def _planned_shapes(plan: Plan, after: Trace) -> Check:
    """Compare with what the plan knows: the smallest shape that each norm met."""
    planned: dict[str, Shapes] = {e.name: (e.shape,) for e in plan.norms if e.shape is not None and e.changes}
    for name, shapes in planned.items():
        found = after.shapes.get(name)
        if found is None:
            return Check("shapes", False, f"{name} ran before and does not any more")
        if not set(shapes) <= set(found):
            return Check("shapes", False, f"{name or 'the network'}: {shapes} became {found}")
    return Check("shapes", True, f"{len(planned)} module outputs keep their shape")


def _no_batch_norm(converted: Network, plan: Plan, functional: Iterable[str]) -> Check:
    name = "no BatchNorm left"
    stay = (entry for entry in plan.norms if entry.by_user or entry.action is Action.FREEZE)
    on_purpose = {name for entry in stay for name in (entry.name, *entry.aliases)}
    left = [norm for norm in converted.norms if norm not in on_purpose]
    left += [f"{where or 'the model'} (calls batch_norm)" for where in functional]
    if left:
        stayed = next((entry for entry in plan.norms if entry.name == left[0] and not entry.changes), None)
        why = "" if stayed is None else f"; {stayed.name}: {stayed.reason}; {way_on(stayed)}"
        return Check(name, False, f"{len(left)} left: {', '.join(left[:3])}{why}")
    done = sum(entry.converts for entry in plan.norms)
    kept_frozen = [entry.by_user for entry in plan.norms if entry.action is Action.FREEZE]
    live = sum(entry.by_user and not entry.changes for entry in plan.norms)
    kept = f", {kept_frozen.count(False)} frozen" if not all(kept_frozen) else ""
    kept += f", {sum(kept_frozen)} kept frozen" if any(kept_frozen) else ""
    kept += f", {live} left as asked: live in train mode" if live else ""
    return Check(name, True, f"{done} of {len(plan.norms)} replaced{kept}")
