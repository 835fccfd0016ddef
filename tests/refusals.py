"""What every refusal has in common: an exit code, one line that ends with the next step, nothing written or changed."""

import re
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from torch import nn

from normswap.cli.app import cli

SHAPE = "2,3,16,16"


def run(*arguments: object) -> tuple[int, str, str]:
    """Run a verb; an error that is not turned into an exit code is raised here."""
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def must_be_one_line(text: str, message: str) -> None:
    """Assert that an error is one line which says what a pattern asks for, and what to do next."""
    assert re.search(message, text), text
    assert "\n" not in text.strip(), text
    assert any(words in text for words in ("; ", "did you mean", "must be", "must look like", "is not one of")), text
    assert "Traceback" not in text


def must_refuse(code: int, message: str, *arguments: object, folder: Path) -> None:
    """Assert that a verb ends with a code and a line on stderr, and leaves every file in a folder as it was."""
    before = files(folder)
    found, stdout, stderr = run(*arguments)
    assert (found, stdout) == (code, ""), (stdout, stderr)
    assert stderr.startswith("normswap: ")
    must_be_one_line(stderr, message)
    assert files(folder) == before


def files(folder: Path) -> dict[str, bytes | None]:
    """Return the contents of everything in a folder, folders as None."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def described(model: Any) -> Any:
    """Return everything about a model that no refusal, and no conversion of a copy, may change."""
    if not isinstance(model, nn.Module):
        return type(model)
    state = {name: bits(tensor) for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    modules = [
        (name, id(module), type(module), module.training, *(list(vars(module).get(hooks, ())) for hooks in HOOKS))
        for name, module in model.named_modules()
    ]
    return state, modules, [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


def bits(tensor: torch.Tensor) -> Any:
    """Return a tensor's type, shape and bytes: NaN equals NaN of the same bits."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.is_meta or tensor.is_quantized:
        return type(tensor)
    return tensor.dtype, tensor.shape, tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
