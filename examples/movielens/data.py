"""100,000 real movie ratings (MovieLens-100K) as features of a click model.

The files come from the wheel of the Python package recbole, fetched by name and checked by hash; nothing is installed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pathlib
import subprocess
import sys
import zipfile

import numpy as np

PACKAGE = "recbole==1.2.1"
WHEEL = "recbole-1.2.1-py3-none-any.whl"
SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
FOLDER = "recbole/dataset_example/ml-100k/ml-100k."

GOOD_RATING = 4
MAX_GENRES = 6
MULTI_HOT = ("genres", "user_x_genres")
"""Features with several ids per rating: [n, MAX_GENRES], padded with 0."""


@dataclasses.dataclass(frozen=True)
class Ratings:
    """Ratings as model inputs.

    Attributes:
        inputs: by name; ids int64 [n, 1] or [n, MAX_GENRES], and "profile" float32 [n, 5].
        labels: float32 [n]: 1 where the rating is at least GOOD_RATING.
        rows: rows of the embedding table of each id feature.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray
    rows: dict[str, int]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: np.ndarray | slice) -> Ratings:
        """Some of the ratings."""
        return Ratings({name: value[index] for name, value in self.inputs.items()}, self.labels[index], self.rows)


def fetch(cache: pathlib.Path) -> pathlib.Path:
    """The wheel that carries the ratings, downloaded into `cache` unless it is there.

    Raises:
        RuntimeError: it cannot be downloaded, or is not the file it should be.
    """
    wheel = cache / WHEEL
    if not wheel.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), PACKAGE]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0 or not wheel.exists():
            raise RuntimeError(f"{' '.join(command)} failed; is there a network?\n{result.stderr.strip()}")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise RuntimeError(f"{wheel} has SHA-256 {digest} instead of {SHA256}; delete it and try again")
    return wheel


def load(wheel: pathlib.Path, table_rows: int) -> Ratings:
    """Reads the ratings and makes features of them.

    Args:
        wheel: what `fetch` returned.
        table_rows: rows that all tables together should have; the two hashed crosses share what the others leave.
    """
    ratings = _read(wheel, "inter")
    users = _read(wheel, "user")
    items = _read(wheel, "item")

    user = ratings["user_id"].astype(np.int64)
    item = ratings["item_id"].astype(np.int64)
    hour = ratings["timestamp"].astype(np.float64).astype(np.int64) // 3600 % 24
    of_user = _positions(users["user_id"].astype(np.int64), user)
    of_item = _positions(items["item_id"].astype(np.int64), item)
    occupation = _vocabulary(users["occupation"])[of_user]
    zip_code = _vocabulary(users["zip_code"])[of_user]
    genres = _genres(items["class"])[of_item]
    age = users["age"].astype(np.float32)[of_user]
    woman = (users["gender"] == "F").astype(np.float32)[of_user]
    years = np.array([float(year) if year.isdigit() else 1990.0 for year in items["release_year"]], np.float32)[of_item]

    single = {"user": user, "item": item, "occupation": occupation, "zip": zip_code, "hour": hour}
    rows = {name: int(ids.max()) + 1 for name, ids in single.items()} | {"genres": int(genres.max()) + 1}
    buckets = max(2, (table_rows - sum(rows.values()) + 1) // 2)
    rows |= {"item_x_hour": buckets, "user_x_genres": buckets}

    inputs = {name: ids[:, None] for name, ids in single.items()}
    inputs["item_x_hour"] = _cross(item, hour, buckets)[:, None]
    inputs["genres"] = genres
    inputs["user_x_genres"] = np.where(genres > 0, _cross(user[:, None], genres, buckets), 0)
    angle = hour * (2 * np.pi / 24)
    profile = [age / 50 - 0.7, woman, (years - 1990) / 20, np.sin(angle), np.cos(angle)]
    inputs["profile"] = np.stack(profile, axis=1).astype(np.float32)
    labels = (ratings["rating"].astype(np.float32) >= GOOD_RATING).astype(np.float32)
    return Ratings(inputs, labels, rows)


def split(ratings: Ratings, held_out: int = 20_000) -> tuple[Ratings, Ratings]:
    """Ratings to train on and ratings to judge by, drawn at random but always the same."""
    order = np.random.default_rng(100).permutation(len(ratings))
    return ratings.take(order[held_out:]), ratings.take(order[:held_out])


def _read(wheel: pathlib.Path, suffix: str) -> dict[str, np.ndarray]:
    """Columns of a tab-separated file as strings; its first line names them, with types behind a colon."""
    with zipfile.ZipFile(wheel) as archive:
        lines = io.StringIO(archive.read(FOLDER + suffix).decode("utf-8")).read().splitlines()
    names = [column.split(":")[0] for column in lines[0].split("\t")]
    columns = zip(*(line.split("\t") for line in lines[1:]), strict=True)
    return {name: np.array(column) for name, column in zip(names, columns, strict=True)}


def _positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    order = np.argsort(ids)
    return order[np.searchsorted(ids, wanted, sorter=order)]


def _vocabulary(words: np.ndarray) -> np.ndarray:
    """Ids from 1 for the different words."""
    return np.unique(words, return_inverse=True)[1].astype(np.int64) + 1


def _genres(texts: np.ndarray) -> np.ndarray:
    """Ids from 1 of the genres named in each text, [n, MAX_GENRES], padded with 0."""
    names = sorted({genre for text in texts for genre in text.split()})
    ids = {name: number for number, name in enumerate(names, start=1)}
    padded = np.zeros((len(texts), MAX_GENRES), np.int64)
    for row, text in enumerate(texts):
        found = [ids[genre] for genre in text.split()][:MAX_GENRES]
        padded[row, : len(found)] = found
    return padded


def _cross(a: np.ndarray, b: np.ndarray, buckets: int) -> np.ndarray:
    """Hashes pairs of ids to 1 .. buckets - 1."""
    mixed = a.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ b.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    mixed ^= mixed >> np.uint64(32)
    return (mixed % np.uint64(buckets - 1)).astype(np.int64) + 1
