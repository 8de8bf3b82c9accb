"""METEOR of a long answer, as the paper measures it, or an honest stand-in where WordNet isn't installed.

The paper: NLTK's `single_meteor_score` on `word_tokenize`d text. Two resources may be missing offline:

* WordNet's synonyms. Taken from NLTK's data or Debian's ``wordnet-base``. Without them only exact and stem
  matches count, and the metric is called ``meteor_exact_stem``.
* Punkt's sentence splitter. `word_tokenize` is Punkt, then NLTK's Treebank-style tokenizer on each sentence;
  without Punkt sentences end at ``.``, ``!`` or ``?`` before white space; the two differ on abbreviations.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# lmms-eval scores in threads; neither NLTK's lazy loading nor its WordNet reader allows that.
_LOCK = threading.RLock()
METEOR, METEOR_WITHOUT_SYNONYMS = "meteor", "meteor_exact_stem"
_DEBIAN_WORDNET = Path("/usr/share/wordnet")


class _NoSynonyms:
    """Stands where NLTK's scorer asks WordNet for a word's synonym sets."""

    def synsets(self, word: str) -> list[Any]:
        """Return none: no word has synonyms."""
        return []


@cache
def _wordnet() -> Any | None:
    import nltk.data
    from nltk.corpus import wordnet
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    try:
        wordnet.ensure_loaded()
        wordnet.synsets("dog")
        return wordnet
    except LookupError:
        pass
    if not (_DEBIAN_WORDNET / "data.noun").is_file():
        return None

    class DebianWordNet(WordNetCorpusReader):
        """Debian's package lacks the list of the lexicographers' files; METEOR needs their number only."""

        def open(self, file: str) -> Any:
            if file == "lexnames":
                return io.StringIO("".join(f"{index:02d}\tfile{index:02d}\t0\n" for index in range(45)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """Make no map to the multilingual WordNets, which isn't installed either."""

    nltk.data.path.append(str(_DEBIAN_WORDNET))  # NLTK reads below these folders only
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no multilingual WordNet: not needed
        return DebianWordNet(nltk.data.FileSystemPathPointer(str(_DEBIAN_WORDNET)), None)


@cache
def _tokenizer() -> Callable[[str], list[str]]:
    from nltk.tokenize import NLTKWordTokenizer, word_tokenize

    try:
        word_tokenize("One. Two.")
        return word_tokenize
    except LookupError:
        treebank = NLTKWordTokenizer()
        return lambda text: [
            word for part in re.split(r"(?<=[.!?])\s+", text.strip()) for word in treebank.tokenize(part)
        ]


def meteor_name() -> str:
    """Return what `meteor` computes here: ``meteor`` with WordNet's synonyms, ``meteor_exact_stem`` without."""
    with _LOCK:
        return METEOR if _wordnet() is not None else METEOR_WITHOUT_SYNONYMS


def meteor(reference: str, prediction: str) -> float:
    """Score in [0, 1] of `prediction` against `reference`, under the metric that `meteor_name` names."""
    from nltk.translate.meteor_score import single_meteor_score

    with _LOCK:
        tokenize, wordnet = _tokenizer(), _wordnet()
        words = tokenize(reference), tokenize(prediction)
        if not words[0] or not words[1]:
            return 0.0
        return single_meteor_score(*words, wordnet=_NoSynonyms() if wordnet is None else wordnet)
