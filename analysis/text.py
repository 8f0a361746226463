"""Movie-review sentences with the sentiment that people see in them, as token ids: two classes, fixed splits.

Twenty people each rated 10,605 sentences of reviews from −4 to 4 (Hutto and Gilbert, 2014). Those whose mean is beyond
±0.5 are used: 10,041 different ones, half of them positive. They come with the source distribution of vaderSentiment.

    training             validation    test
    7,029 (at most)      1,004         2,008

Splits are stratified, and depend neither on a run's seed nor on the training size. Nothing is downloaded.
"""

import io
import tarfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from efcp.analysis.data import DataSet, Split, first, named_folder, stratified_order
from efcp.analysis.minilm import PADDING, model_directory

NAME = "movie-reviews"
LENGTH = 64
"""Tokens that are kept of a sentence; 6 sentences have more, up to 79."""
SOURCE = "vaderSentiment-3.3.2.tar.gz"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
"""Path of the archive inside `SOURCE`."""
TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
"""Path of the table inside `ARCHIVE`. Each line has a number, the mean rating and the sentence, separated by tabs."""


def load_text(directory: Path | None = None, train_size: int | None = None) -> DataSet:
    """Sentences as ids (n, 64) int64 of MiniLM's tokens, padded with 0 at the end; the label is 1 for a positive one.

    Args:
        directory: where `SOURCE` is; None for `$EFCP_DATA`.
        train_size: training sentences; None for all.

    Raises:
        FileNotFoundError: if the sentences or the tokenizer are missing; it says how to get them.
        ValueError: for a corrupted file, or more training sentences than there are.
    """
    sentences, labels = select(read_ratings(find_source(directory)))
    order = stratified_order(labels)
    fifth, tenth = len(order) // 5, len(order) // 10
    test, validation, rest = order[:fifth], order[fifth : fifth + tenth], order[fifth + tenth :]
    train = first(rest, train_size, len(rest))
    ids = tokenize(sentences)
    return DataSet(NAME, *(Split(ids[part], labels[part]) for part in (train, validation, test)))


def find_source(directory: Path | None = None) -> Path:
    """Finds the source distribution of vaderSentiment.

    Raises:
        FileNotFoundError: if it is not there.
    """
    named = named_folder(directory)
    if named and (named / SOURCE).is_file():
        return named / SOURCE
    raise FileNotFoundError(
        f"{SOURCE} was not found in {named or 'EFCP_DATA, which is not set'}. Name its folder with --data-dir or the "
        "environment variable EFCP_DATA; to get it:\n"
        "  pip download --no-deps --no-binary vaderSentiment --dest FOLDER vaderSentiment==3.3.2"
    )


def read_ratings(path: Path) -> list[tuple[float, str]]:
    """Mean ratings in [−4, 4] and sentences, from `TABLE` in `ARCHIVE` in the file.

    Raises:
        ValueError: if the file is truncated, corrupted or of another format.
    """
    try:
        with tarfile.open(path) as outer, tarfile.open(fileobj=_member(outer, ARCHIVE)) as inner:
            lines = _member(inner, TABLE).read().decode().splitlines()
        rows = [line.split("\t") for line in lines]
        return [(float(rating), sentence.strip()) for _, rating, sentence in rows]
    except (EOFError, KeyError, OSError, UnicodeDecodeError, ValueError, tarfile.TarError, zlib.error) as error:
        raise ValueError(f"{path} is truncated, corrupted or of another format: {error}") from error


def select(ratings: list[tuple[float, str]]) -> tuple[list[str], Tensor]:
    """Sentences whose mean rating is beyond ±0.5, without repetitions in another case, and labels (n,) int64."""
    chosen: dict[str, tuple[str, int]] = {}
    for rating, sentence in ratings:
        if abs(rating) > 0.5:
            chosen.setdefault(sentence.casefold(), (sentence, int(rating > 0)))
    return [sentence for sentence, _ in chosen.values()], torch.tensor([label for _, label in chosen.values()])


def tokenize(sentences: list[str]) -> Tensor:
    """Ids (n, 64) int64 of MiniLM's tokens, with those for beginning and end.

    Raises:
        FileNotFoundError: if the package with the tokenizer is not installed.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_directory() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH, pad_id=PADDING)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(sentences)])


def _member(archive: tarfile.TarFile, name: str) -> io.BytesIO:
    """A file in an archive; KeyError where there is none."""
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return io.BytesIO(file.read())
