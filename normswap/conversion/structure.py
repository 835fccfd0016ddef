"""Check what a trace shows: shapes, and BatchNorm left in any slot or any operator."""

from collections.abc import Callable, Iterable, Iterator

from normswap.conversion.checks import Check, Checks
from normswap.conversion.sizes import agree
from normswap.networks.network import Network
from normswap.networks.references import strays
from normswap.planning.choices import Action
from normswap.planning.entry import NormEntry
from normswap.planning.plan import Plan
from normswap.tracing.facts import Trace
from normswap.tracing.operators import OTHER_NORMS
from normswap.tracing.recorder import Shapes

AROUND = "its code may ask for what only BatchNorm has: leave that layer alone with exclude="
"""The way on with a network that looks at its norms."""

ASKED = "its code may ask what a layer is or holds: leave that layer alone with exclude="
"""The way on with a network that computes something else by the class of its layers."""

TEACH, LEAVE = "or teach it with normswap.register_norm", "or leave it alone with exclude="
"""Ways on with a norm that is not shown to be BatchNorm."""


def way_on(entry: NormEntry) -> str:
    """Return what else helps with a norm that stays, besides what its reason says."""
    return LEAVE if entry.is_turned else f"{TEACH}, {LEAVE}"


def structural_checks(
    converted: Network, plan: Plan, after: Trace, before: Trace | None, others: Iterable[Trace]
) -> Checks:
    """Return the checks of a converted network's structure.

    Args:
        converted: The converted network.
        plan: What it was converted by.
        after: A trace of it.
        before: A trace of the network before conversion, where it is at hand.
        others: Traces with other values (`normswap.conversion.sizes.disturbed`) of the network before conversion, where
            that is at hand, else of the converted one; read where shapes differ.
    """
    functional = {*after.functional_norms, *(() if before is None else before.functional_norms)}
    shapes = _planned_shapes(plan, after, others) if before is None else _same_shapes(plan, after, before, others)
    return Checks((shapes, _no_batch_norm(converted, plan, sorted(functional))))


def left_behind(converted: Network) -> Iterator[Check]:
    """Yield a check that fails where a layer still is that another has taken the place of."""
    known = {id(conv.raw_weight): name for name, conv in converted.standardized()}
    for module, where in strays(converted.model):
        for parameter in module._parameters.values():
            if id(parameter) in known:
                what = f"{where} still runs {known[id(parameter)]} as it was, a {type(module).__name__}"
                yield Check("no layer left behind", False, f"{what}; take it off or convert again")


def erased(plan: Plan, after: Trace) -> Iterator[Check]:
    """Yield a check that fails where an input is so small that a norm's groups hold a single value each."""
    for entry in plan.norms:
        for shape in after.shapes.get(entry.name, ()):
            if entry.changes and entry.erases(shape):
                what = f"{entry.name} meets {shape}: one value in each of {entry.groups} groups, which it erases"
                yield Check("values per group", False, f"{what}; pass larger inputs, or convert with such an example")
                return


def _same_shapes(plan: Plan, after: Trace, before: Trace, others: Iterable[Trace]) -> Check:
    name, given_up = "shapes", _inside_norms(plan)
    if gone := [module for module in before.shapes if module not in after.shapes and not given_up(module)]:
        why = (
            after.stopped_by or "the forward pass goes another way, as one does that asks whether a layer is BatchNorm"
        )
        return Check(name, False, f"{gone[0] or 'the network'} ran before and does not any more ({why}); {AROUND}")
    other = [module for module, shapes in before.shapes.items() if after.shapes.get(module, shapes) != shapes]
    passes = [before, *others] if other else []
    for module in other:
        shapes, found = before.shapes[module], after.shapes[module]
        if not agree(shapes, found, _met(module, passes)):
            return Check(name, False, f"{module or 'the network'}: {shapes} became {found}")
    if (otherwise := _otherwise(plan, after, before)) is not None:
        return Check(name, False, f"{otherwise}; {ASKED}")
    return _kept(len(before.shapes), len(other))


def _otherwise(plan: Plan, after: Trace, before: Trace) -> str | None:
    """Tell of an operator outside of replaced layers that runs in a pass without data, and did not before conversion.

    One that ran before and does not any more may have filled a cache. Nothing is told where a replaced layer is called
    past its hooks, or gradients are taken: its own are among them.
    """
    ran = {*before.norms, *before.convs} & {entry.name for entry in plan.changes}
    news = after.operators - before.operators
    stopped = before.stopped_by or after.stopped_by or before.with_data or after.with_data
    if stopped or ran - before.shapes.keys() or any(operator.endswith("_backward") for _, operator in news):
        return None
    replaced = tuple(f"{entry.name}.".lstrip(".") for entry in plan.entries)
    for module, operator in sorted(news):
        if operator not in OTHER_NORMS and not f"{module}.".lstrip(".").startswith(replaced):
            return f"{operator} in {module or 'the network'} did not run before"
    return None


def _met(module: str, passes: Iterable[Trace]) -> list[Shapes]:
    return [one.shapes[module] for one in passes if module in one.shapes]


def _kept(count: int, moving: int) -> Check:
    but = f", but for {moving} of which sizes follow from values" if moving else ""
    return Check("shapes", True, f"{count} module outputs keep their shape{but}")


def _inside_norms(plan: Plan) -> Callable[[str], bool]:
    """Return a function that tells whether a module was a part of a replaced norm and none that goes on running."""
    replaced = {f"{entry.name}.".lstrip("."): entry.then for entry in plan.norms if entry.changes}
    start = tuple(replaced)

    def inside(name: str) -> bool:
        owner = next((prefix for prefix in start if name.startswith(prefix)), None) if name.startswith(start) else None
        return owner is not None and name.removeprefix(owner).partition(".")[0] not in replaced[owner]

    return inside


def _planned_shapes(plan: Plan, after: Trace, others: Iterable[Trace]) -> Check:
    """Compare with what the plan knows: the smallest shape that each norm met."""
    planned: dict[str, Shapes] = {e.name: (e.shape,) for e in plan.norms if e.shape is not None and e.changes}
    if gone := [norm for norm in planned if norm not in after.shapes]:
        return Check("shapes", False, f"{gone[0]} ran before and does not any more")
    other = [norm for norm, shapes in planned.items() if not set(shapes) <= set(after.shapes[norm])]
    passes = [after, *others] if other else []
    for norm in other:
        shapes, found = planned[norm], after.shapes[norm]
        if not agree(shapes, found, _met(norm, passes), in_part=True):
            return Check("shapes", False, f"{norm or 'the network'}: {shapes} became {found}")
    return _kept(len(planned), len(other))


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
