"""Which class of transformers opens a model, and which of its parts reads and writes text: the only one that is trained."""

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from posttrain.operators.layers import text_model

# files beside a model that say how pictures are prepared for it
PICTURES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of a config's model: the one that also sees pictures where the config has a part for them; None for no class."""
    text = config.get_text_config()
    if text is not config and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def class_in(folder) -> type[PreTrainedModel]:
    """Return the class that opens the model in a folder."""
    found = class_of(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    assert found is not None
    return found


def freeze_all_but_text(model: PreTrainedModel) -> int:
    """Make buffers of all parameters but those of the language model and the head; returns how many numbers they hold.

    So are parameters that an architecture never trains, such as the state that HRM begins with. They are saved and written, but have
    neither gradients nor optimizer states, and no engine shards or gathers them.
    """
    sees_text_only = model.config.get_text_config() is model.config  # then all is trained: some have more than one matrix as their head
    parts = [model] if sees_text_only else [text_model(model), model.get_output_embeddings()]
    trained = {id(one) for part in parts if part is not None for one in part.parameters()}
    count = 0
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in trained or not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data)
                count += parameter.numel()
    return count
