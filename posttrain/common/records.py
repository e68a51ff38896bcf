"""The types of what a JSON or YAML object holds, and the error that names the first value of another type. Imports no torch."""

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict, ValidationError

from posttrain.common.errors import shown_name


class Record(BaseModel):
    """The types of known keys, where they are there; others may be there, too."""

    model_config = ConfigDict(extra="allow", strict=True)


def check_record(record: Mapping, form: type[Record]) -> None:
    """Raise ValueError naming the first key of `record` that is missing or of another type than `form` says."""
    try:
        form.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise ValueError(f"{shown_name('.'.join(map(str, first['loc'])))}: {first['msg']}") from None
