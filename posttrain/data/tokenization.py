"""Loads tokenizers, from a Hugging Face folder or hub name, or from a SentencePiece `.model` file, ready for the chat format.

A tokenizer made from a `.model` file gives exactly the ids that SentencePiece gives for the same text; loading proves it on probe
texts. With the template chatml a tokenizer leaves here with <|im_start|> and <|im_end|>, with any template with a padding token.
"""

import hashlib
import json
import os
import warnings
from pathlib import Path

import sentencepiece
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from posttrain.common import hub
from posttrain.common.errors import reason
from posttrain.common.files import WEIGHTS, read_object
from posttrain.common.links import refuse_links
from posttrain.data.chatml import IM_END, IM_START
from posttrain.data.encoding import encode_text

EXPECTED = "a folder with tokenizer.json or tokenizer.model, a SentencePiece .model file, or a hub name such as org/name"
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"}
MORE_ROWS = 1000  # how many rows a model's embedding may get besides a tenth of what it has
SPACE = "▁"  # SentencePiece's visible space
PIECE = sentencepiece_model_pb2.ModelProto.SentencePiece
PROBES = (
    *("", " ", "  ", "a", " a", "a ", "  a  b   c ", "Hello, world! It's 3.14.", "UPPER lower MiXed", "\n", "\n\n", "a\n\nb\n"),
    *("\t", "a\tb", "\r\n", "a \n b", "▁", "▁▁a▁", "a▁ b", "1234567890", "aaaaaaaaaaaaa", "-------", "=" * 31, "        x"),
    *("naïve café", "cafe\u0301", "日本語のテキスト", "한국어", "\u1112\u1161\u11ab", "Ελληνικά", "العربية", "\u200b", "🙂🙂"),
    *("👩\u200d👧", "\u00a0x\u3000y", "\ufeffx", "\uff46\uff55\uff4c\uff4c\u3000x", "ﬁ ½ ™", "\x00", "<0x0A>", "<unk>", "<s>"),
    *("Once upon a time, there was a little girl named Lily.", "def f(x):\n    return x  # ok\n", "https://example.org/?a=b&c=d"),
)


def load_tokenizer(path, template: str = "chatml") -> PreTrainedTokenizerBase:
    """Load the tokenizer at `path`: a Hugging Face folder or hub name (org/name), or a SentencePiece .model file.

    For the template chatml it adds <|im_start|> and <|im_end|>, for any a padding token, where they are missing, so its vocabulary can
    outgrow a model's embeddings (see grow_embeddings). Raises FileNotFoundError where nothing is found, ValueError for files that
    cannot be used.
    """
    path = hub.snapshot_in(os.fspath(path))
    if os.path.isdir(path) and TOKENIZER_FILES & set(os.listdir(path)) == {"tokenizer.model"}:
        path = os.path.join(path, "tokenizer.model")  # a bare SentencePiece file beside a model
    if os.path.isfile(path):
        if not path.endswith(".model"):
            raise ValueError(f"{path} is not a tokenizer; expected {EXPECTED}")
        if template != "chatml":
            raise ValueError(f"{path} is a bare SentencePiece model and has no chat template of its own; use chatml")
        return _from_sentencepiece(path)
    tokenizer = open_tokenizer(path)
    if type(tokenizer) is transformers.SentencePieceBackend:
        tokenizer.__class__ = SentencePieceBackend
    return _with_chat_tokens(tokenizer, template)


def open_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Open the tokenizer in a Hugging Face folder or at a hub name as transformers does, and add nothing to it.

    Code that comes with it is never run. Raises as load_tokenizer does.
    """
    path = hub.snapshot_in(path)
    return _always_the_same(_from_folder(path) if os.path.isdir(path) else _from_hub(path), path)


def _always_the_same(tokenizer: PreTrainedTokenizerBase, path: str) -> PreTrainedTokenizerBase:
    """Switch off a tokenizer's random splitting of words, as BPE dropout; raises ValueError where a text still has other ids each time."""
    model = tokenizer.backend_tokenizer.model if tokenizer.is_fast else None
    if getattr(model, "dropout", None):
        warnings.warn(f"{path} splits words at random (BPE dropout {model.dropout} in tokenizer.json); that is off here", stacklevel=3)
        model.dropout = None
    text = " ".join(PROBES)
    if any(encode_text(tokenizer, text) != encode_text(tokenizer, text) for _ in range(5)):
        raise ValueError(
            f"the tokenizer in {path} splits the same text differently each time: switch that off in its files (enable_sampling in "
            "sp_model_kwargs of tokenizer_config.json)"
        )
    return tokenizer


def fingerprint(tokenizer) -> str:
    """Identify a tokenizer by 16 hex digits: equal for a copy saved and loaded again, others if a text's ids may differ."""
    rules = []
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges") or []
    identity = {
        "vocabulary": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "merges": [rule.split(" ") if isinstance(rule, str) else rule for rule in rules],
        "special": [sorted(tokenizer.all_special_ids), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id],
        "probes": [[encode_text(tokenizer, text), tokenizer(text)["input_ids"]] for text in (*PROBES, IM_START + "x" + IM_END)],
    }
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def grow_embeddings(model, tokenizer) -> int:
    """Give the model a row for every id of the tokenizer; returns the number of rows added (0 when there are enough).

    A new row is the mean of the old ones, in the input embedding and in an untied head. Uses no random numbers; never shrinks. Raises
    ValueError for a tokenizer with far more ids than the model has rows.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    needed = 1 + max(tokenizer.get_vocab().values())
    if needed <= rows:
        return 0
    if needed > rows * 1.1 + MORE_ROWS:
        raise ValueError(
            f"the tokenizer has ids up to {needed - 1:,}, the model has rows for {rows:,}: it is another model's tokenizer, or its files "
            "are damaged. Name the one that the model was trained with"
        )
    with torch.random.fork_rng(), torch.no_grad():  # the resize initialises new rows at random before they are set here
        model.resize_token_embeddings(needed, mean_resizing=False)
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for values in (module.weight, getattr(module, "bias", None)) if module is not None else ():
                if values is not None:
                    values[rows:] = values[:rows].float().mean(0).to(values.dtype)
    return needed - rows


class SentencePieceBackend(transformers.SentencePieceBackend):
    """transformers' slow tokenizer with SentencePiece's own decoding; it is saved under the name of its base class, and loads as that."""

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text that tokens spell. The base class strips it and leaves byte pieces such as <0x0A> undecoded."""
        text, run = "", []
        for token in [*tokens, None]:
            if token is not None and token not in self._added_tokens_encoder:
                run.append(token)
                continue
            text += self.sp_model.decode(run) + (token or "")
            run = []
        return text


def _from_folder(path: str) -> PreTrainedTokenizerBase:
    """Load a Hugging Face folder. Raises ValueError."""
    seen = set(os.listdir(path))
    if not seen & TOKENIZER_FILES:
        advice = ""
        if {"vocab.json", "merges.txt"} <= seen:
            advice = "; vocab.json and merges.txt do not say how text is split: put the model's tokenizer_config.json beside them"
        found = ", ".join(sorted(seen)[:12]) or "nothing"
        raise ValueError(f"{path} holds no tokenizer; expected {EXPECTED}; found {found}{advice}")
    refuse_links(path, WEIGHTS)
    hub.refuse_pointers(path, sorted(name for name in seen if not name.endswith(WEIGHTS)))
    for name in sorted(seen & {"tokenizer.json", "tokenizer_config.json"}):
        read_object(Path(path) / name)
    try:
        return _used_once(AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False))
    except Exception as error:  # of any kind: files of somebody else's may fail anywhere in transformers
        raise _unreadable(path, error) from error


def _from_hub(name: str) -> PreTrainedTokenizerBase:
    """Load a hub name, from the local cache where the hub cannot be reached. Raises FileNotFoundError or ValueError."""
    if not hub.is_hub_name(name):
        raise FileNotFoundError(f"{name} does not exist; expected {EXPECTED}")
    reachable = hub.is_reachable()
    try:
        return _used_once(AutoTokenizer.from_pretrained(name, local_files_only=not reachable, trust_remote_code=False))
    except OSError as error:
        where = "nor on the hub" if reachable else "nor in the hub's local cache, and the hub cannot be reached"
        raise ValueError(f"{name} is not a folder here {where}; expected {EXPECTED}") from error
    except Exception as error:  # as in a folder
        raise _unreadable(name, error) from error


def _used_once(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Encode and decode a text: some of what is wrong in a tokenizer's files fails only then, with any error. Returns the tokenizer.

    Raises ValueError for ids that are far beyond the number of tokens: libraries and models take memory for each id up to the highest.
    """
    vocabulary = tokenizer.get_vocab()
    if (most := max(vocabulary.values(), default=0)) > 10 * len(vocabulary) + MORE_ROWS:
        raise ValueError(f"it has ids up to {most:,}, but only {len(vocabulary):,} tokens")
    text = " ".join(PROBES)
    tokenizer.convert_tokens_to_ids("\0 is no token")  # recurses without end where the token for unknown ones is none itself
    for ids in (tokenizer(text)["input_ids"], encode_text(tokenizer, text)):
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return tokenizer


def _unreadable(place: str, error: Exception) -> ValueError:
    """Return the error for a tokenizer that transformers cannot open: that it needs code of its own, or the first line of the reason."""
    try:
        code = get_tokenizer_config(place, local_files_only=True).get("auto_map")
    except Exception:  # what is wrong with the file is in `error`
        code = None
    if code:
        return ValueError(
            f"the tokenizer in {place} needs code that comes with it (auto_map in tokenizer_config.json), and such code is never run here: "
            "name another tokenizer; or, where its tokenizer.json says all, remove auto_map and tokenizer_class from tokenizer_config.json"
        )
    try:
        AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)  # which AutoTokenizer reads, too
    except Exception as other:  # of any kind, as above
        if reason(other) == reason(error):
            return ValueError(f"{place}/config.json cannot be read: {reason(error)}. Compare it with the original's")
    return ValueError(f"the tokenizer in {place} cannot be read: {reason(error)}. Copy its files again")


def _with_chat_tokens(tokenizer, template: str) -> PreTrainedTokenizerBase:
    """Add the special tokens that load_tokenizer promises."""
    if template == "chatml":
        special = [AddedToken(token, special=True, normalized=False) for token in (IM_START, IM_END)]
        tokenizer.add_tokens(special, special_tokens=True)  # one that exists keeps its id
    if tokenizer.pad_token_id is None:  # only batched generation pads; training never does
        usable = ("<|endoftext|>", IM_END, tokenizer.eos_token)
        tokenizer.pad_token = next((token for token in usable if token in tokenizer.get_vocab()), None)
    return tokenizer


def _from_sentencepiece(path: str) -> PreTrainedTokenizerBase:
    """Load a SentencePiece .model file. Raises ValueError."""
    hub.refuse_pointers(os.path.dirname(path), [os.path.basename(path)])
    try:
        proto = sentencepiece_model_pb2.ModelProto()
        with open(path, "rb") as file:
            proto.ParseFromString(file.read())
        sp = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except Exception as error:  # protobuf's DecodeError (not exported alike by its versions) or SentencePiece's RuntimeError
        raise ValueError(f"{path} is not a SentencePiece model: {error}") from error
    marked = [piece.piece for piece in proto.pieces if piece.piece in (IM_START, IM_END) and piece.type == PIECE.USER_DEFINED]
    if marked:
        raise ValueError(
            f"{path} has {', '.join(marked)} as user-defined symbols, so SentencePiece would turn text that spells them into chat "
            "markers; train it without them (they are added here), or with --control_symbols"
        )
    control = [piece.piece for piece in proto.pieces if piece.type == PIECE.CONTROL]
    kwargs = {
        f"{name}_token": sp.id_to_piece(index)
        for name, index in (("bos", sp.bos_id()), ("eos", sp.eos_id()), ("unk", sp.unk_id()), ("pad", sp.pad_id()))
        if index >= 0
    }
    if reason := _why_not_fast(proto):
        warnings.warn(f"{path} has {reason}, which only SentencePiece itself reproduces: using the slower tokenizer", stacklevel=3)
        tokenizer = _slow(path, kwargs)
    else:
        tokenizer = _fast(proto, kwargs)
    tokenizer.add_tokens([AddedToken(piece, special=True, normalized=False) for piece in control], special_tokens=True)
    tokenizer = _with_chat_tokens(tokenizer, "chatml")
    _prove(path, tokenizer, sp, [*kwargs.values(), *control, IM_START, IM_END])
    return tokenizer


def _prove(path: str, tokenizer, sp, special: list[str]) -> None:
    """Raise ValueError for the first probe whose ids are not SentencePiece's, or that becomes the special token which it spells."""
    known = next((piece for piece in map(sp.id_to_piece, range(sp.get_piece_size())) if piece.isalpha()), "a")
    for text in (*PROBES, *special, *(known + token + known for token in special)):
        expected, seen = sp.encode(text), encode_text(tokenizer, text)
        if seen != expected:
            raise ValueError(f"{path} cannot be used: for the text {text!r} SentencePiece gives {expected}, transformers {seen}")


def _why_not_fast(proto) -> str | None:
    """Name what in a SentencePiece model the tokenizers library would not reproduce for every text; None if there is nothing."""
    scores = [piece.score for piece in proto.pieces if piece.type == PIECE.NORMAL and len(piece.piece) > 1]
    characters = {piece.piece for piece in proto.pieces if piece.type == PIECE.NORMAL and len(piece.piece) == 1}
    reasons = {
        "a model type other than BPE": proto.trainer_spec.model_type != proto.trainer_spec.BPE,  # Unigram: ties, float32 sums
        "a normalization table": bool(proto.normalizer_spec.precompiled_charsmap),  # applied to graphemes there, not prefixes
        "spaces as suffixes": proto.trainer_spec.treat_whitespace_as_suffix,
        "unescaped spaces": not proto.normalizer_spec.escape_whitespaces,
        "user-defined symbols": any(piece.type == PIECE.USER_DEFINED for piece in proto.pieces),
        "unused pieces": any(piece.type == PIECE.UNUSED for piece in proto.pieces),
        "control pieces of one character": any(
            piece.type in (PIECE.CONTROL, PIECE.UNKNOWN) and len(piece.piece) == 1 for piece in proto.pieces
        ),
        "pieces of equal score": len(set(scores)) < len(scores),
        "pieces of unknown characters": any(
            piece.type == PIECE.NORMAL and not characters.issuperset(piece.piece) for piece in proto.pieces
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _fast(proto, kwargs: dict) -> PreTrainedTokenizerBase:
    """A fast tokenizer with the pieces and rules of a SentencePiece BPE model."""
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    byte_fallback, prefix = proto.trainer_spec.byte_fallback, proto.normalizer_spec.add_dummy_prefix
    backend = Tokenizer(models.BPE(vocab, _merges(proto), unk_token=kwargs["unk_token"], fuse_unk=True, byte_fallback=byte_fallback))
    steps = [normalizers.Replace(" ", SPACE)]
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps = [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" +"), SPACE)]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))  # adds nothing to an empty text, as SentencePiece does
    if proto.normalizer_spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(SPACE + r"+\z"), ""))
    backend.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(content=" ", left=1, right=0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, add_bos_token="bos_token" in kwargs, clean_up_tokenization_spaces=False, **kwargs
    )


def _merges(proto) -> list[tuple[str, str]]:
    """Every way to join two normal pieces to a third, best first: by the score of the piece they make, as SentencePiece does.

    Ways to make the same piece tie there and are ordered here; a test over random vocabularies looks for a text that shows it.
    """
    pieces = sorted((piece for piece in proto.pieces if piece.type == PIECE.NORMAL), key=lambda piece: -piece.score)
    normal = {piece.piece for piece in pieces}
    rules = []
    for text in (piece.piece for piece in pieces):
        cuts = [cut for cut in range(1, len(text)) if text[:cut] in normal and text[cut:] in normal]
        rules += [(text[:cut], text[cut:]) for cut in cuts]
    return rules


def _slow(path: str, kwargs: dict) -> PreTrainedTokenizerBase:
    """A tokenizer that calls SentencePiece itself."""
    pattern = {"special_tokens_pattern": "bos"} if "bos_token" in kwargs else {}
    tokenizer = SentencePieceBackend(vocab_file=path, clean_up_tokenization_spaces=False, **pattern, **kwargs)
    tokenizer.init_kwargs.update(pattern)  # the base class drops it, and a saved copy would add no begin-of-text token
    return tokenizer
