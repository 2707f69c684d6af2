"""A model folder behind lm-eval's interface, and the interface as lm-eval's evaluator sees it."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from lm_eval.api.instance import Instance  # type: ignore[import-untyped]
from lm_eval.api.model import LM  # type: ignore[import-untyped]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from llamapro.evaluation.benchmarks.crew import Answering, Arguments


class LogLikelihood(tuple[float, bool]):
    """A log-likelihood and whether the text is the greedy one, as lm-eval takes them; `tokens` have it together."""

    tokens: int

    @classmethod
    def of(cls, value: float, greedy: bool, tokens: int) -> "LogLikelihood":
        """From its parts."""
        found = cls((value, greedy))
        found.tokens = tokens
        return found


class _CountingModel(HFLM):  # type: ignore[misc]
    """lm-eval's transformers model; its log-likelihoods of tokens come with their number."""

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool, int]]:
        found = super()._loglikelihood_tokens(requests, **options)
        return [(*one, len(continuation)) for one, (_, _, continuation) in zip(found, requests, strict=True)]


def load_model(folder: str, dtype: str, device: torch.device, batch_size: int) -> Answering:
    """A model folder, answering through lm-eval's own transformers model."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    weights: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model = _CountingModel(
        pretrained=weights.to(device).eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        backend="causal",
        batch_size=batch_size,
    )

    def answer(kind: str, requests: Sequence[Arguments], seed: int) -> list[Any]:
        torch.manual_seed(seed)  # the same samples whatever was answered before, and on whichever rank
        instances = [Instance(kind, {}, tuple(arguments), number) for number, arguments in enumerate(requests)]
        found: list[Any] = getattr(model, kind)(instances, disable_tqdm=True)
        return [list(one) if isinstance(one, tuple) else one for one in found]

    return answer


class AskedModel(LM):  # type: ignore[misc]
    """What lm-eval evaluates: passes requests on.

    Args:
        answer: the answers to requests of one kind.
        tokenizer: its chat template is what prompts are put into.
    """

    def __init__(
        self, answer: Callable[[str, Sequence[Arguments]], list[Any]], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        super().__init__()
        self._answer = answer
        self._tokenizer = tokenizer

    def loglikelihood(self, requests: list[Any]) -> list[LogLikelihood]:
        """Log-likelihoods of continuations."""
        return [LogLikelihood.of(*answer) for answer in self._ask("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Log-likelihoods of whole texts."""
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Texts up to a stop string."""
        return self._ask("generate_until", requests)

    @property
    def tokenizer_name(self) -> str:
        """Part of lm-eval's name for kept prompts, which are not used."""
        return ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it."""
        text = self._tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        assert isinstance(text, str)
        return text

    def _ask(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        return self._answer(kind, [list(request.args) for request in requests])
