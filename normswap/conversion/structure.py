"""Check that a converted network behaves as promised: structure on the meta device, numbers on real tensors."""

from typing import Any

from torch import nn

from normswap.conversion.behaviour import behaviour_checks
from normswap.conversion.checks import Check, Checks
from normswap.conversion.surgery import plan_of
from normswap.networks.copying import module_names
from normswap.networks.inputs import rebuild
from normswap.networks.recognition import is_batch_norm
from normswap.networks.validation import unwrap
from normswap.planning.plan import Plan
from normswap.tracing.forward import Trace, trace
from normswap.tracing.recorder import Shapes


def check(converted: nn.Module, original: nn.Module | None = None, *, example_input: Any = None) -> Checks:
    """Check a converted network; neither model is changed.

    >>> checks = check(convert(model), model)
    >>> assert checks, checks

    Runs the network a few times on random inputs of the example's shapes (float32 on the model's device).

    Args:
        converted: What `normswap.convert` or `normswap.load` returned.
        original: The network before conversion; its module outputs and gradients are compared where it is given.
        example_input: As for `normswap.convert`; by default the shapes recorded in the plan.

    Returns:
        Checks of output shapes, BatchNorm left, finiteness, batch size 1, batch independence, train() against eval()
        and gradients.

    Raises:
        PlanMismatch: The network was not converted by normswap.
        NeedsExampleInput: No forward pass ran.
    """
    converted = unwrap(converted)
    plan = plan_of(converted)
    if example_input is None and plan.inputs is not None:
        example_input = rebuild(plan.inputs)
    reached = [entry.name for entry in plan.norms if entry.shape is not None]
    after = trace(converted, example_input, until=reached, edges=False)
    before = None if original is None else trace(unwrap(original), after.inputs, edges=False)
    structural = structural_checks(converted, plan, after, before)
    return Checks((*structural.rows, *behaviour_checks(converted, original, after.inputs)))


def structural_checks(converted: nn.Module, plan: Plan, after: Trace, before: Trace | None) -> Checks:
    """Check what a trace shows: shapes, and BatchNorm left in any slot or any operator."""
    return Checks((_same_shapes(plan, after, before), _no_batch_norm(converted, plan, after)))


def _same_shapes(plan: Plan, after: Trace, before: Trace | None) -> Check:
    if before is None:
        expected: dict[str, Shapes] = {e.name: (e.shape,) for e in plan.norms if e.shape is not None and e.changes}
    else:
        expected = {name: shapes for name, shapes in before.shapes.items() if name in after.shapes}
    wrong = [name for name, shapes in expected.items() if not _keeps(shapes, after.shapes.get(name), before)]
    missing = [name for name in expected if name not in after.shapes]
    if before is not None:
        missing = [name for name in before.shapes if name not in after.shapes]
    if wrong or missing:
        name = (wrong or missing)[0]
        where = name or "the network"
        return Check("shapes", False, f"{where}: {expected.get(name)} became {after.shapes.get(name)}")
    return Check("shapes", True, f"{len(expected)} module outputs keep their shape")


def _keeps(shapes: Shapes, found: Shapes | None, before: Trace | None) -> bool:
    """Tell whether a module's outputs have the shapes they had; a plan knows a shared norm's smallest alone."""
    return found is None or found == shapes or (before is None and set(shapes) <= set(found))


def _no_batch_norm(converted: nn.Module, plan: Plan, after: Trace) -> Check:
    on_purpose = {name for e in plan.norms if e.by_user for name in (e.name, *e.aliases)}
    names = module_names(converted)
    left = [names[id(m)][0] for m in converted.modules() if is_batch_norm(m) and names[id(m)][0] not in on_purpose]
    left += [f"{name or 'the model'} (calls batch_norm)" for name in after.functional_norms]
    if left:
        why = next((f"; {left[0]}: {entry.reason}" for entry in plan.norms if entry.name == left[0]), "")
        return Check("no BatchNorm left", False, f"{len(left)} left: {', '.join(left[:3])}{why}")
    done = sum(entry.changes for entry in plan.norms)
    kept = f", {len(on_purpose)} left as asked" if on_purpose else ""
    return Check("no BatchNorm left", True, f"{done} of {len(plan.norms)} replaced{kept}")
