"""Text to token rows: the only place that knows how a prompt and its target are joined.

Prompt, joint and target are one text, and its tokens are those that the tokenizer makes of it, with
its special tokens in front; what it puts behind a text (EOS) is left off, since an answer goes on.
The tokens behind those of the prompt alone are the labels. Where the tokenizer would make one token
across the seam, the prompt keeps its own tokens, from which a model goes on, and what follows has
those it has as a continuation. Rows are padded on the right whatever the tokenizer's setting, so no
result depends on the padding side.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pymend.config import EditRequest, Probe, joint_of

IGNORE = -100  # target of a position that has no label
# Prompts through the chat template: yes, with these options of it, or no; None where nobody says.
Chat = bool | Mapping[str, Any] | None
OWN_OPTIONS = ("add_generation_prompt", "tokenize", "conversation", "chat_template")
THOUGHT = re.compile(r"[<\[]think(ing)?[>\]]\s*\Z", re.IGNORECASE)

STRAY = re.compile(r"(?<=\S) +$")  # spaces at the end of a text, no indentation
ANCHORS = ("\n", "a", ".")  # behind one of these a text is a continuation


@dataclass(frozen=True)
class Row:
    """One tokenised text; the logits of interest are those from position ``first`` on.

    With an answer, positions ``first .. len - 2`` predict the tokens after them. Without one
    (``answer=False``) every position counts, and the last has no target.

    ``source`` is what an encoder reads; ``ids`` are then those of its decoder, from the start token
    on. A text to be classified has a ``label``, the class or IGNORE, and one position.
    """

    ids: tuple[int, ...]
    first: int = 0
    answer: bool = True
    source: tuple[int, ...] = ()
    label: int | None = None

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: the last token of an answer is predicted, never read."""
        return self.ids[:-1] if self.answer and self.label is None else self.ids

    @property
    def prefix(self) -> tuple[int, ...]:
        """What the lowest blocks read: the encoder's, if there is one."""
        return self.source or self.inputs

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the answer."""
        decoder_only = self.answer and self.label is None
        return self.source or (self.ids[: self.first + 1] if decoder_only else self.ids)

    def positions(self) -> range:
        """Positions whose logits are looked at."""
        if self.label is not None:
            return range(self.first, 1)
        return range(self.first, len(self.ids) - 1 if self.answer else len(self.ids))

    def targets(self) -> list[int]:
        """The token that each of :meth:`positions` should predict, or the class."""
        if self.label is not None:
            return [self.label for _ in self.positions()]
        following = [*self.ids[1:], IGNORE]
        return [following[t] for t in self.positions()]

    def without_answer(self) -> Row:
        """The prompt alone, every position of it looked at."""
        if self.label is not None:
            return replace(self, label=IGNORE, answer=False)
        ids = self.ids[:1] if self.source else self.prompt
        return Row(ids, 0, False, self.source)

    def followed(self, ids: Sequence[int]) -> Row:
        """The whole text as a prompt, and ``ids`` as its answer."""
        return replace(self, ids=(*self.ids, *ids), first=len(self.ids) - 1)

    def whole(self) -> Row:
        """The same text with every position looked at."""
        return replace(self, first=0)

    def part(self, tokens: int, answer: int = 1) -> Row:
        """The first so many of the tokens that the lowest blocks read, all positions looked at.

        The last one stays where a text has a frame. A decoder behind an encoder reads its start
        token, ``answer`` times.
        """
        if self.source:
            source = (*self.source[: tokens - 1], self.source[-1])
            return Row(self.ids[:1] * answer, answer=False, source=source)
        if self.label is not None:
            return Row((*self.ids[: tokens - 1], self.ids[-1]), answer=False, label=self.label)
        return Row(self.inputs[:tokens], answer=False)

    def filler(self) -> Row:
        """A short row of the same kind with no position that is looked at."""
        return replace(self, ids=self.ids[:1], first=1, answer=False, source=self.source[:1])


@dataclass(frozen=True)
class EncodedRequest:
    """An :class:`~pymend.config.EditRequest` as rows."""

    edit: Row
    rephrases: tuple[Row, ...]
    locality: tuple[Row, ...]
    old: Row | None  # the edit prompt with the true object
    old_rephrases: tuple[Row, ...]
    portability: tuple[Row, ...]
    # Prompt and rephrases with the target, and what the unedited model says behind it.
    after: tuple[Row, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Padded rows and the label positions in them.

    ``inputs`` are what the model is called with, [rows, tokens] int64 each: ``input_ids`` and
    ``attention_mask``, and the ``decoder_input_ids`` behind an encoder. ``row``, ``position`` and
    ``target`` [labels] list the positions whose logits are looked at, row after row.
    """

    rows: tuple[Row, ...]
    inputs: dict[str, Tensor]
    row: Tensor
    position: Tensor
    target: Tensor

    @classmethod
    def of(
        cls, rows: Sequence[Row], device: torch.device | str = "cpu", padding: int | None = None
    ) -> Batch:
        """Pad ``rows`` on the right.

        Args:
            padding: the model's own padding token, if it knows one. Padding is masked and carries
                no label, but a decoder that classifies looks for its last token by that id.
        """
        padding = padding or 0
        ids, mask = _padded([r.prefix for r in rows], padding)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if rows[0].source:
            # A decoder looks back only, so its padding needs no mask.
            inputs["decoder_input_ids"], _ = _padded([r.inputs for r in rows], padding)
        labels = [
            (i, t, y)
            for i, r in enumerate(rows)
            for t, y in zip(r.positions(), r.targets(), strict=True)
        ]
        table = torch.tensor(labels, dtype=torch.long).reshape(-1, 3).t().contiguous()
        # No copy waits for what a GPU is doing.
        row, position, target = table.to(device, non_blocking=True).unbind()
        on_device = {name: x.to(device, non_blocking=True) for name, x in inputs.items()}
        return cls(tuple(rows), on_device, row, position, target)


def padding_of(model: torch.nn.Module) -> int | None:
    """The id that ``model`` knows as padding, of its text part; None if it knows none."""
    config: Any = getattr(model, "config", None)
    found = getattr(config.get_text_config(), "pad_token_id", None) if config else None
    return found if isinstance(found, int) and found >= 0 else None


def _padded(rows: Sequence[tuple[int, ...]], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [rows, tokens] int64."""
    width = max(map(len, rows))
    ids = torch.tensor([[*r, *[padding] * (width - len(r))] for r in rows])
    length = torch.tensor([len(r) for r in rows])
    return ids, (torch.arange(width) < length[:, None]).long()


def stacked(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Flat rows [n, .] of several texts or edits as [counts, rows, .], zero rows behind short ones.

    A copy for each of them would be as many launches on a GPU.
    """
    if len(set(counts)) == 1:
        return rows.view(len(counts), counts[0], rows.shape[1])
    length, place = torch.tensor(counts)[:, None], torch.arange(max(counts))
    behind = place >= length
    index = (length.cumsum(0) - length + place).masked_fill(behind, 0).flatten()
    index, behind = (x.to(rows.device, non_blocking=True) for x in (index, behind))
    padded = rows.index_select(0, index).view(*behind.shape, rows.shape[1])
    return padded.masked_fill(behind[..., None], 0)


class Encoder:
    """Tokenises requests for a decoder: prompt and answer are one text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        limit: the model's context length in tokens; 0 for none.
        chat: put prompts through the tokenizer's chat template, with these options of it.

    Raises:
        ValueError: ``chat`` with a tokenizer that has no chat template, or options that the
            template does not have.
    """

    continues_text = True  # the model predicts every token of a plain text

    def __init__(self, tokenizer: Any, limit: int = 0, chat: Chat = None) -> None:
        chat = settled(chat)
        self.tokenizer, self.limit, self.chat = tokenizer, limit, chat is not False
        self._options = dict(chat) if isinstance(chat, Mapping) else {}
        self._behind = _behind(tokenizer)
        if self.chat:
            _check_template(getattr(tokenizer, "chat_template", None), self._options)
            if THOUGHT.search(self._asked("a")):
                warnings.warn(
                    "the chat template opens a thought, so that answers are taught inside it; "
                    "most such templates have an option against it, "
                    'chat={"enable_thinking": False} (--chat-options enable_thinking=false)',
                    stacklevel=2,  # once, whoever asks for the encoder
                )

    @staticmethod
    def for_model(model: torch.nn.Module, tokenizer: Any, chat: Chat = None) -> Encoder:
        """The encoder of ``model``'s kind, limited to the context length in its configuration.

        Raises:
            ValueError: ``chat`` for a model or tokenizer that has no chat template.
        """
        config: Any = model.config
        limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
        limit = limit if isinstance(limit, int) and limit > 0 else 0  # XLNet has -1: none
        if model.get_output_embeddings() is None:  # type: ignore[operator]
            return ClassEncoder(tokenizer, limit, config.num_labels, config.label2id, chat)
        if getattr(config, "is_encoder_decoder", False):
            start = config.decoder_start_token_id
            if start is None:
                raise ValueError(
                    f"{type(model).__name__} does not say what its decoder starts from; set "
                    "model.config.decoder_start_token_id"
                )
            return SequenceEncoder(tokenizer, limit, start, chat)
        return Encoder(tokenizer, limit, chat)

    def row(self, prompt: str, target: str | None = None, joint: str | None = None) -> Row:
        """Tokenise ``prompt``, ``joint`` and ``target`` as one text.

        Args:
            joint: what stands between them. None: :func:`joint_of`, once spaces at the end of the
                prompt and around the target count for nothing; behind a chat template, nothing.

        Raises:
            ValueError: an empty prompt, a target without tokens, or a text beyond the context.
        """
        _check_prompt(prompt)
        if joint is None:
            prompt, target = _tidy(prompt, target)
        if self.chat:
            prompt, joint = self._asked(prompt), joint or ""
        elif joint is None:
            joint = joint_of(prompt, target or "")
        ids = self._ids(prompt)
        if not ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens")
        if target is None:
            row = Row(tuple(ids), 0, answer=False)
        else:
            answer = self._continued(prompt, ids, joint + target) if target.strip() else []
            _check_answer(prompt, target, answer)
            row = Row((*ids, *answer), len(ids) - 1)
        self._check_length(prompt, len(row.ids))
        return row

    def text(self, best: Tensor) -> str:
        """What the predictions ``best`` [k] at a row's label positions say."""
        return str(self.tokenizer.decode(best))

    def _asked(self, prompt: str) -> str:
        """What the chat template makes of a question."""
        turn = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(
            turn, add_generation_prompt=True, tokenize=False, **self._options
        )
        return str(text)

    def _ids(self, text: str) -> list[int]:
        """The tokens of a text that goes on. A chat template brings its own special tokens."""
        ids = list(self.tokenizer(text, add_special_tokens=not self.chat).input_ids)
        behind = 0 if self.chat else self._behind
        return ids[: len(ids) - behind]

    def _continued(self, prompt: str, ids: list[int], text: str) -> list[int]:
        """The tokens of ``text`` behind those of ``prompt``.

        Raises:
            ValueError: the tokenizer does not tell them from those of what stands before.
        """
        whole = self._ids(prompt + text)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
        for anchor in ANCHORS:
            before, both = self._ids(anchor), self._ids(anchor + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        raise ValueError(
            f"this tokenizer joins the end of the prompt {prompt!r} with what follows, {text!r}; "
            "give another joint"
        )

    def _check_length(self, prompt: str, tokens: int) -> None:
        if self.limit and tokens > self.limit:
            raise ValueError(
                f"prompt and target have {tokens} tokens, the model's context is "
                f"{self.limit}; shorten {prompt[:60]!r}"
            )

    def probe(self, probe: Probe) -> Row:
        """Tokenise a locality or portability prompt."""
        return self.row(probe.prompt, probe.answer, probe.joint)

    def request(self, request: EditRequest) -> EncodedRequest:
        """Tokenise everything in ``request``."""
        old, joint = request.ground_truth, request.joint
        return EncodedRequest(
            edit=self.row(request.prompt, request.target, joint),
            rephrases=tuple(self.row(text, request.target, joint) for text in request.rephrases),
            locality=tuple(self.probe(p) for p in request.locality),
            old=self.row(request.prompt, old, joint) if old else None,
            old_rephrases=tuple(self.row(text, old, joint) for text in request.rephrases if old),
            portability=tuple(self.probe(p) for p in request.portability),
        )

    def requests(self, requests: Sequence[EditRequest]) -> list[EncodedRequest]:
        """Tokenise a data set.

        Raises:
            ValueError: names the first record that cannot be used.
        """
        encoded = []
        for index, request in enumerate(requests):
            try:
                encoded.append(self.request(request))
            except ValueError as error:
                raise ValueError(f"record {index}: {error}") from error
        return encoded


class SequenceEncoder(Encoder):
    """Tokenises for an encoder-decoder: the prompt is its source, the answer ends with EOS.

    Args:
        start: the token a decoder starts from.
    """

    continues_text = False

    def __init__(self, tokenizer: Any, limit: int, start: int, chat: Chat = None) -> None:
        _refuse_chat(chat, "an encoder-decoder")
        super().__init__(tokenizer, limit)
        self.start = start

    def row(self, prompt: str, target: str | None = None, joint: str | None = None) -> Row:
        """Source and answer; without a ``target``, the decoder's first position is looked at.

        Args:
            joint: what stands before the target. None: nothing, and spaces at the end of the prompt
                and around the target count for nothing.

        Raises:
            ValueError: an empty prompt, a target without tokens, or a text beyond the context.
        """
        _check_prompt(prompt)
        if joint is None:
            prompt, target = _tidy(prompt, target)
        source = self.tokenizer(prompt).input_ids
        ids = [self.start]
        if target is not None:
            text = target.lstrip(" ") if joint is None else joint + target
            answer = self.tokenizer(text, add_special_tokens=False).input_ids
            _check_answer(prompt, target, answer)
            ids += [*answer, self.tokenizer.eos_token_id]
        self._check_length(prompt, max(len(source), len(ids)))
        return Row(tuple(ids), 0, target is not None, tuple(source))

    def text(self, best: Tensor) -> str:
        """The predicted answer, up to its end."""
        ids = best.tolist()
        end = ids.index(self.tokenizer.eos_token_id) if self.tokenizer.eos_token_id in ids else None
        return str(self.tokenizer.decode(ids[:end])).strip()


class ClassEncoder(Encoder):
    """Tokenises for a classifier, whose targets are names or numbers of classes.

    Args:
        classes: outputs of the model; one output is two classes, "false" and "true".
        names: the model's own names of its classes.
    """

    continues_text = False

    def __init__(
        self, tokenizer: Any, limit: int, classes: int, names: dict[str, int], chat: Chat = None
    ) -> None:
        _refuse_chat(chat, "a classifier")
        super().__init__(tokenizer, limit)
        own = {"false": 0, "true": 1} if classes == 1 else {k.lower(): v for k, v in names.items()}
        self.names = {i: name for name, i in own.items()}
        self.classes = {**{str(i): i for i in own.values()}, **own}

    def row(self, prompt: str, target: str | None = None, joint: str | None = None) -> Row:
        """The text, and its class if ``target`` names one.

        Raises:
            ValueError: an empty prompt, a class that the model does not have, a ``joint``, or a
                text beyond the context.
        """
        _check_prompt(prompt)
        if joint is not None:
            raise ValueError(f"a classifier joins nothing to {prompt!r}; leave out joint")
        prompt, target = _tidy(prompt, target)
        ids = self.tokenizer(prompt).input_ids
        self._check_length(prompt, len(ids))
        if target is None:
            return Row(tuple(ids), answer=False, label=IGNORE)
        label = self.classes.get(target.strip().lower())
        if label is None:
            raise ValueError(
                f"the target {target!r} of prompt {prompt!r} is no class of this model; "
                f"choose one of {', '.join(self.names.values())}"
            )
        return Row(tuple(ids), label=label)

    def text(self, best: Tensor) -> str:
        """The name of the predicted class."""
        return ", ".join(self.names[i] for i in best.tolist())


def _tidy(prompt: str, target: str | None) -> tuple[str, str | None]:
    """Both without spaces at the seam that say nothing, and without spaces at the end.

    Those behind a line break are an indentation and stay.
    """
    prompt = STRAY.sub("", prompt)
    if target is None or not target.strip():
        return prompt, target
    return prompt, (target if prompt[-1:].isspace() else target.lstrip(" ")).rstrip(" ")


def _behind(tokenizer: Any) -> int:
    """How many special tokens a tokenizer puts behind a text."""
    framed = list(tokenizer("a").input_ids)
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    for behind in range(len(framed) - len(plain) + 1):
        end = len(framed) - behind
        if framed[end - len(plain) : end] == plain:
            return behind
    return 0


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise ValueError("the prompt is empty; give at least one word")


def _check_answer(prompt: str, target: str, ids: Sequence[int]) -> None:
    if not target.strip() or not ids:
        raise ValueError(f"the target {target!r} of prompt {prompt!r} has no tokens; give a word")


def settled(chat: Chat) -> bool | dict[str, Any]:
    """``chat`` as it is kept: no, yes, or the options of the template, if there are some."""
    return (dict(chat) or True) if isinstance(chat, Mapping) else bool(chat)


def _check_template(template: Any, options: Mapping[str, Any]) -> None:
    if not template:
        raise ValueError("this tokenizer has no chat template; leave out chat")
    for name in options:
        if name in OWN_OPTIONS or not re.search(rf"\b{re.escape(name)}\b", str(template)):
            raise ValueError(f"the chat template has no option {name!r}; leave it out")


def _refuse_chat(chat: Chat, kind: str) -> None:
    if settled(chat):
        raise ValueError(f"{kind} has no chat; leave out chat")
