"""Draw networks from the grammar of tests/grammar.py and hold each to what plain float64 torch computes.

python benchmarks/grammar.py [--networks 2000] [--seed 0]
python benchmarks/grammar.py --mutants [--networks 40]

Prints the seed, and of the first network that fails what it was drawn from and why, reduced to the smallest one that
hypothesis finds. 2,000 networks take ten minutes of one core.

--mutants takes one rule away after another, of every one of the fourteen kinds of faults, and tells which word of the
grammar shows that it is missing; every rule must be missed.
"""

import argparse
import random
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from grammar import Sentence, sentences
from test_grammar import must_hold

from normswap import tables
from normswap.checkpoint import saving
from normswap.conversion.checks import Checks
from normswap.layers import matching
from normswap.layers.accumulation import SharedKernel
from normswap.layers.convs import WeightStandardized
from normswap.layers.standardization import gain_and_offset
from normswap.networks.surroundings import Surroundings
from normswap.planning import decisions
from normswap.tracing import forward, graph, recorder


def of_the_filters_now(conv: Any) -> dict[str, Any]:
    """Return gain and offset that follow the filters."""
    gain, offset = gain_and_offset(conv.ws_filters(), conv.ws_eps)
    return {"gain": gain, "offset": offset if conv.ws_offset is not None else None}


def none_apart(**reads: Any) -> Any:
    """Return what reads convolutions, no norm of which reads more than their output."""
    return READS(**reads | {"apart": lambda _: None})


KIND_OF, READS = recorder.kind_of, decisions._Reads
MUTANTS: dict[str, tuple[Any, str, Any, tuple[str, ...]]] = {
    "1: norms are what they look like": (decisions, "departure", lambda *_: "", ("norm: train", "norm: gamma")),
    "2: weights are not read": (recorder.Parameters, "note_reads", lambda *_: None, ("its weight",)),
    "2: tied weights are apart": (
        decisions, "_share_fate_of_tied_weights", lambda convs, _: convs, ("another layer",)
    ),
    "3: a mask is a number like others": (recorder, "steers", lambda *_: [], ("index", "weight", "grid")),
    "3: products scale": (
        recorder, "kind_of", lambda name, data, *more: KIND_OF(name, 1, *more), ("square", "product")
    ),
    "3: nothing leaves": (recorder.Recorder, "finish", lambda *_, **__: None, ("attribute", "dict")),
    "3: train mode is eval mode": (forward, "branches_on_mode", lambda _: False, ("train",)),
    "4: zero filters are filters": (decisions, "cannot_grow", lambda *_, **__: False, ("zero branch",)),
    "5: quiet channels are silent": (matching, "HEARD", float("inf"), ("conv", "norm first")),
    "6: nothing stands between": (decisions, "_Reads", none_apart, ("joined", "shuffled", "summed")),
    "7: gain and offset follow the filters": (WeightStandardized, "constants", of_the_filters_now, ("conv",)),
    "8: weights stay within accumulate": (SharedKernel, "verify", lambda _: None, ("conv",)),
    "9: every check passes": (Checks, "__bool__", lambda _: True, ("conv", "added")),
    "10: plans stay after conversion": (saving, "present_plan", lambda _, plan: plan, ("conv", "depthwise")),
    "11: a pass of a copy leaves nothing": (Surroundings, "undisturbed", lambda _: nullcontext(), ("counted",)),
    "12: what masks leave is filters": (WeightStandardized, "take_kernel", lambda *_: None, ("conv",)),
    "13: names are text": (tables, "plain", str, ("escaped",)),
    "14: a layer tells of all others": (graph, "FEW", 10**6, ("deep",)),
}  # fmt: skip
"""Rules by their kind and what is believed without them: where one is, what takes its place, and the words to draw."""


def main() -> None:
    """Draw, check, and tell what was drawn."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--networks", type=int, default=2000)
    arguments.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    arguments.add_argument("--mutants", action="store_true", help="take one rule away after another")
    wanted = arguments.parse_args()
    print(f"seed {wanted.seed}", flush=True)
    if wanted.mutants:
        missed = [name for name in MUTANTS if not shown(name, wanted)]
        sys.exit(", ".join(missed) or 0)
    words: Counter[str] = Counter()

    @seed(wanted.seed)
    @settings(
        max_examples=wanted.networks,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(sentences())
    def each(drawn: Sentence) -> None:
        words.update({"networks": 1, **dict.fromkeys(drawn.words, 1)})
        must_hold(drawn)

    each()
    print(", ".join(f"{count} {word}" for word, count in words.most_common()))


def shown(name: str, wanted: argparse.Namespace) -> bool:
    """Take a rule away, and tell whether one of its words fails without it."""
    where, attribute, instead, words = MUTANTS[name]
    found = dict[str, str]()
    for word in words:

        @seed(wanted.seed)
        @settings(
            max_examples=min(wanted.networks, 40),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(sentences(word))
        def each(drawn: Sentence) -> None:
            must_hold(drawn)

        with mock.patch.object(where, attribute, instead):
            try:
                each()
            except (Exception, pytest.fail.Exception) as error:  # whatever comes of it
                found[word] = (str(error).strip() or type(error).__name__).splitlines()[0][:80]
                break
    print(f"{name}: {'; '.join(f'{word}: {what}' for word, what in found.items()) or 'NOT SEEN'}", flush=True)
    return bool(found)


if __name__ == "__main__":
    main()
