"""Reads rows of datasets of the hub."""

from collections.abc import Iterator

from data_prep.catalogue import Hub
from data_prep.formats.arrow import rows_of
from data_prep.formats.opening import Row
from posttrain.common import hub


def hub_rows(dataset: Hub, split: str, revision: str | None) -> Iterator[Row]:
    """Yield the rows of a hub dataset, from the local cache where the hub cannot be reached. Raises ValueError."""
    import datasets
    import huggingface_hub

    if not hub.is_reachable():  # go to the local cache at once: the libraries would try for half a minute first
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    label = f"{dataset.name} ({', '.join(filter(None, (dataset.config, dataset.folder, split)))})"
    try:
        rows = datasets.load_dataset(dataset.name, dataset.config, data_dir=dataset.folder, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = "the hub" if hub.is_reachable() else "the local cache, and the hub cannot be reached"
        raise ValueError(
            f"{label} cannot be loaded from {where}: {error}\nWhere the hub is out of reach, give the same rows with "
            f"--source FILE_OR_DIR; a private dataset needs HF_TOKEN in the environment"
        ) from error
    table = rows.data.table  # as it lies in the cache: pictures are not decoded
    yield from rows_of(label, table.schema, table.to_batches())
