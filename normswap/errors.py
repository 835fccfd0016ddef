"""Every error normswap raises on purpose, named by what the user can do about it."""

from normswap.texts import plain


class NormswapError(Exception):
    """Base of all errors of this package; the message is one line and ends with the next step."""

    def __str__(self) -> str:
        """Return the message; what is not printable in the names it quotes is escaped."""
        return plain(super().__str__())


class InvalidOption(NormswapError, ValueError):
    """Correct an option: its value, or its combination with another one."""


class UnsupportedModel(NormswapError, TypeError):
    """Convert the model at another stage of its life: before scripting, quantizing, wrapping or sharding it."""


class NeedsExampleInput(NormswapError):
    """Pass ``example_input=``: no forward pass ran with an input made up from the model."""


class NothingToConvert(NormswapError):
    """Nothing matched: the model holds no BatchNorm, or the options leave all of it alone."""


class PlanMismatch(NormswapError):
    """Apply the plan to the network it was made for: a layer is missing or of another kind."""


class BadStatistics(NormswapError, ValueError):
    """Repair the weights: they overflow or are not finite, or running statistics are negative or not finite."""


class CheckpointError(NormswapError):
    """Give another file or folder: this one is missing, damaged or not what it claims to be."""


class HubError(NormswapError):
    """Check the name, the access token and the network: the hub refused or did not answer."""


class CheckFailed(NormswapError):
    """Look at the failed check: the converted network does not behave as promised."""


class CalibrationFailed(NormswapError):
    """Pass other images: too few, or of a kind on which the two networks cannot be compared."""


class ExportFailed(NormswapError):
    """Choose another format or place: nothing was written, or what was written computes something else."""


class TransferFailed(NormswapError):
    """Build another target: it runs other layers, or cannot take what is to go there; nothing was changed."""


class WeightsChanged(NormswapError, RuntimeError):
    """Change weights after the block: gradients gathered inside it belong to the weights it began with."""


class WrittenInPlace(NormswapError, RuntimeError):
    """Write ``y = y + x`` in the forward pass: backward hooks do not allow what it does in place."""


class UnknownModel(NormswapError, LookupError):
    """Choose another model name; the message lists the nearest ones."""


class WeightsUnavailable(NormswapError):
    """Pass ``--weights FILE`` or ``--no-pretrained``: the pretrained weights cannot be had from here."""


class NormswapWarning(UserWarning):
    """Base of all warnings of this package; the message is one line."""

    def __str__(self) -> str:
        """Return the message; what is not printable in the names it quotes is escaped."""
        return plain(super().__str__())


class AlreadyConverted(NormswapWarning):
    """The network was converted before; nothing was changed."""


class CheckpointAdapted(NormswapWarning):
    """The checkpoint was read after its tensors had been unpacked or renamed; the message says how."""


def way_to_have(*packages: str, extra: str) -> str:
    """Return how to install what is missing: by name, or with the extra that holds it, in a clone of this repository.

    >>> way_to_have("matplotlib", extra="plot")
    "pip install matplotlib, or in a clone of normswap pip install '.[plot]'"
    """
    return f"pip install {' '.join(packages)}, or in a clone of normswap pip install '.[{extra}]'"


def first_line(error: BaseException) -> str:
    """Return what an error says first, or its class where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def described(error: BaseException) -> str:
    """Return an error's class and what it says first, in a line."""
    line, kind = first_line(error), type(error).__name__
    return kind if line == kind else f"{kind}: {line}"
