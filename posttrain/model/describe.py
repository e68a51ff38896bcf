"""Writes what a model's folder holds beside its weights: config, generation config, tokenizer and chat templates.

The folder carries what the base had, so that it runs as the base did: sampling defaults, stop tokens, further templates. Transformers 5
writes some keys under new names only; those that transformers 4, and programs which read the files themselves, look for stand beside them.
"""

import json
from pathlib import Path

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from posttrain.common.files import read_object
from posttrain.data import tokenization
from posttrain.data.chat import THINKS, ChatFormat
from posttrain.model import own_code

# model type -> the names that transformers 4 has for the base of the rotary frequencies and for the rotated share of a head
OLD_ROTARY_NAMES = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
OF_THREE_KEYS = ("phi3", "phimoe")  # model types whose rope_scaling has exactly these in transformers 4
NOT_SCALING = ("rope_theta", "partial_rotary_factor")  # keys of rope_parameters that transformers 4 has outside rope_scaling


def write_config(model: PreTrainedModel, chat: ChatFormat | None, folder: Path) -> None:
    """Write config.json: the config in memory, with the template's end token, and readable by transformers 4 and 5."""
    config = type(model.config).from_dict({**model.config.to_dict(), "use_cache": True})
    config.architectures = [type(model).__name__]
    for part in (config, config.get_text_config()) if chat is not None else ():
        own, eos, bos = (getattr(part, f"{name}_token_id", None) for name in ("pad", "eos", "bos"))
        _set(part, "eos_token_id", _stops(chat, eos))
        part.bos_token_id = chat.tokenizer.bos_token_id if bos is None else bos
        # transformers trains no input embedding of the pad token, so it must be none that training teaches; but models that also see
        # pictures put it where these are
        if own in _taught(chat) and part is config.get_text_config() is config:
            _set(part, "pad_token_id", None)
    config.save_pretrained(folder)
    path = folder / "config.json"
    values = read_object(path)
    values.pop("auto_map", None)  # names files of code that are not here, and that transformers' own class does not need
    if names := own_code.write(model, folder):
        values["auto_map"] = names
    if values.get("num_nextn_predict_layers"):
        values["num_nextn_predict_layers"] = 0  # layers of multi-token prediction, which transformers neither trains nor holds
    _write(path, values | older_names(values, config.attribute_map))
    try:
        is_same = _rotary(AutoConfig.from_pretrained(folder, trust_remote_code=False)) == _rotary(config)
    except (KeyError, ValueError, TypeError):  # by the rope type
        is_same = False
    if not is_same:  # transformers 5 reads the older names, too
        _write(path, values)


def _set(config: PreTrainedConfig, name: str, value: list[int] | None) -> None:
    """Set a token, or several, in a config; where its family takes a single one, the first of them, and where it must have one, no other.

    generation_config.json has all.
    """
    try:
        setattr(config, name, value)
    except StrictDataclassFieldValidationError:
        if value is not None:
            setattr(config, name, value[0])


def older_names(config: dict, aliases: dict[str, str]) -> dict:
    """Return the keys by which transformers 4 knows what config.json's content says in transformers 5's form.

    `aliases`: other names that the config's class has for its keys.
    """
    keys = {"torch_dtype": config["dtype"]} if config.get("dtype") else {}
    keys |= {alias: config[name] for alias, name in aliases.items() if "experts" in alias and name in config}
    rope = config.get("rope_parameters") or {}
    if local := rope.get("sliding_attention"):  # a rotary embedding for each kind of layer, as in Gemma 3
        keys["rope_local_base_freq"] = local.get("rope_theta")
    rope = (rope["full_attention"] or {}) if "full_attention" in rope else rope
    if "rope_theta" not in rope:
        return keys
    base, share = OLD_ROTARY_NAMES.get(config["model_type"], NOT_SCALING)
    keys[base] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        keys[share] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {name: value for name, value in rope.items() if name not in NOT_SCALING}
        if config["model_type"] in OF_THREE_KEYS:
            keys["rope_scaling"] = {"type": "longrope", "short_factor": rope.get("short_factor"), "long_factor": rope.get("long_factor")}
    return keys


def write_generation_config(model: PreTrainedModel, chat: ChatFormat, folder: Path) -> None:
    """Write generation_config.json: the base's own defaults, with the template's end token first among its stop tokens.

    Plain JSON, since transformers (5.23) refuses to write settings that contradict each other, which it reads.
    """
    own = model.generation_config.to_diff_dict()
    own.pop("_from_model_config", None)
    taught, pad = _taught(chat), chat.tokenizer.pad_token_id
    own["eos_token_id"] = _stops(chat, own.get("eos_token_id"))
    if own.get("bos_token_id") is None and chat.tokenizer.bos_token_id is not None:
        own["bos_token_id"] = chat.tokenizer.bos_token_id
    if own.get("pad_token_id") is None and pad is not None and pad not in taught:
        own["pad_token_id"] = pad
    _write(folder / "generation_config.json", own)


def write_tokenizer(chat: ChatFormat, folder: Path) -> list[str]:
    """Write the tokenizer with the template that was trained. Returns notes on templates of the base that are left out.

    Raises ValueError where the folder reads back as another tokenizer.
    """
    tokenizer, notes = chat.tokenizer, []
    own = tokenizer.chat_template
    others = {name: text for name, text in own.items() if name != "default"} if isinstance(own, dict) else {}
    if others and chat.template == "chatml":  # they write another format than was trained
        notes.append(f"the base's templates {', '.join(others)} are in another format than ChatML, which was trained; they are left out")
        others = {}
    try:
        tokenizer.chat_template = {"default": chat.jinja, **others} if others else chat.jinja
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own
    path = folder / "tokenizer_config.json"
    _write(path, _readable_by_both(read_object(path), chat))
    again = tokenization.load_tokenizer(folder, chat.template)
    if tokenization.fingerprint(again) != tokenization.fingerprint(tokenizer):
        raise ValueError(
            f"the tokenizer written to {folder} reads back as another one; please report its class, {type(tokenizer).__name__}"
        )
    return notes


def _readable_by_both(values: dict, chat: ChatFormat) -> dict:
    """Return tokenizer_config.json's content such that transformers 4 reads it, too, without what would name files that are not there."""
    values = {name: value for name, value in values.items() if name not in ("auto_map", THINKS)}
    if chat.thinks:
        values[THINKS] = True
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    given, pad = chat.tokenizer.init_kwargs, chat.tokenizer.pad_token_id
    values |= {name: given[name] for name in ("add_bos_token", "add_eos_token") if isinstance(given.get(name), bool)}
    # tokenization gives one to a tokenizer that has none, to generate with
    is_ours = given.get("pad_token") is None or pad == chat.end_id != chat.tokenizer.eos_token_id
    if is_ours and pad in _taught(chat):
        values.pop("pad_token", None)
    return values


def _rotary(config) -> dict:
    """Return what a config says of rotary positions, but for `type`, an older name of rope_type beside it."""
    return {name: value for name, value in (getattr(config, "rope_parameters", None) or {}).items() if name != "type"}


def _stops(chat: ChatFormat, own: int | list[int] | None) -> list[int]:
    """Return the ids that end an answer: the template's, the tokenizer's and those that the model had."""
    ids = [chat.end_id, chat.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(token for token in ids if token is not None))


def _taught(chat: ChatFormat) -> set[int]:
    """Return the ids of the end tokens, which training teaches."""
    return {chat.end_id, chat.tokenizer.eos_token_id} - {None}


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
