"""Conversations about one image, from LLaVA's JSON format, as LVIS-Instruct4V and ShareGPT4V ship them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynllava_plugin.errors import UserError
from dynllava_plugin.evaluation.llava_json import JsonList, image_names, read_sample
from dynllava_plugin.model.prompts import IMAGE_TOKEN


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about one image.

    Attributes
    ----------
    id, image : str
        The image as the file names it.
    turns : tuple of (question, answer)
        Without image markers.
    """

    id: str
    image: str
    turns: tuple[tuple[str, str], ...]

    @property
    def words(self) -> int:
        """Return the number of words of all answers, as white space separates them."""
        return sum(len(answer.split()) for _, answer in self.turns)


def read_conversations(path: Path) -> tuple[list[Conversation], list[str]]:
    """Return the file's conversations, and a line for each entry that isn't one about one image.

    Raises
    ------
    UserError
        If the file can't be read or isn't a JSON list.
    """
    found, broken = [], []
    for number, entry in enumerate(JsonList(path)):
        identity = str(entry.get("id", number) if isinstance(entry, dict) else number)
        name = f"entry {number} (id {identity})"
        try:
            found.append(_conversation(name, identity, entry))
        except UserError as error:
            broken.append(str(error))
    return found, broken


def _conversation(name: str, identity: str, entry: Any) -> Conversation:
    sample = read_sample(name, entry)
    if len(sample.images) != 1:
        raise UserError(f"{name} has {len(sample.images)} images, not one")
    turns = [(question.replace(IMAGE_TOKEN, "").strip(), answer.strip()) for question, answer in sample.turns]
    return Conversation(identity, sample.images[0], tuple(turns))


def images_of(path: Path) -> set[str]:
    """Return the file names, without folders, of all images in a training mixture."""
    return {Path(image).name for entry in JsonList(path) for image in image_names(entry)}
