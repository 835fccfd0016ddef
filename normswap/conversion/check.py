"""Check that a converted network behaves as promised: what a trace shows, then what numbers show."""

from typing import Any

from torch import nn

from normswap.conversion.behaviour import behaviour_checks
from normswap.conversion.carried_plan import plan_of
from normswap.conversion.checks import Checks
from normswap.conversion.sizes import disturbed
from normswap.conversion.structure import erased, left_behind, structural_checks
from normswap.networks.inputs import rebuild
from normswap.networks.network import Network
from normswap.networks.settings import own_settings
from normswap.networks.validation import unwrap
from normswap.tracing.forward import trace


@own_settings()
def check(converted: nn.Module, original: nn.Module | None = None, *, example_input: Any = None) -> Checks:
    """Check a converted network; neither model is changed.

    >>> checks = check(convert(model), model)
    >>> assert checks, checks

    Runs the network a few times on random numbers of the example's shapes (float32 on the model's device). Whole
    numbers and truth values of an example are used as they are, and so are floats of which there is one a sample
    (lengths, times), masks of zeros and ones, and all values where random ones do not run.

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
        UnsupportedModel: A network cannot be copied.
    """
    network, plan = Network(unwrap(converted)), plan_of(converted)
    if example_input is None and plan.inputs is not None:
        example_input = rebuild(plan.inputs)
    reached = [entry.name for entry in plan.norms if entry.shape is not None]
    after = trace(network, example_input, until=reached, edges=False)
    how: dict[str, Any] = {"until": reached, "edges": False, "with_data": after.with_data}
    first = None if original is None else Network(unwrap(original))
    before = None if first is None else trace(first, after.example, **how)
    others = disturbed(first or network, plan, before or after)
    structural = structural_checks(network, plan, after, before, others)
    stopped = after.stopped_by is not None
    behaviour = behaviour_checks(network.model, plan, original, after.example, after.samples, stopped=stopped)
    return Checks((*left_behind(network), *structural.rows, *erased(plan, after), *behaviour))
