"""Room for new tokens in a trained network: rows of the embedding, and of the head where that has its own.

A new row is the mean of the old ones plus noise that tells new rows apart. At the mean a new token is never likelier than the old ones
are on average (Hewitt 2021, "Initializing new word embeddings for pretrained language models"), so a network of which it is not asked
goes on as before.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from ingot.models.randomness import normals

_TABLES = ("transformer.wte.weight", "model.embed_tokens.weight", "lm_head.weight")
# Beyond the streams that initial weights take, which are numbered by parameter.
_FIRST_STREAM = 1 << 24
_NOISE = 0.1
# Tokens that were never seen lie near the mean, so the farther ones say how far a token lies that is used.
_FROZEN_QUANTILE = 0.9


def grow_vocabulary(
    state: Mapping[str, npt.NDArray[np.generic]], *, num_known: int, num_ids: int, seed: int, frozen: bool = False
) -> dict[str, npt.NDArray[np.generic]]:
    """The weights of the same network with a vocabulary of at least ``num_ids``.

    Parameters
    ----------
    state
        Weights by Hugging Face name, tables of the vocabulary [V, hidden_size]. V may be more than ``num_known`` where the vocabulary
        was padded.
    num_known
        Ids that the network was trained with. Their rows stay as they are, to the bit.
    num_ids
        Ids that it is to have; rows ``num_known`` to ``num_ids - 1`` are new.
    seed
        Of the noise: normal, a tenth of the old rows' standard deviation in each dimension.
    frozen
        The new rows stay as they begin, under an adapter: as far from the mean as nine tenths of the old ones are at most. Near the mean
        a token could never become the likeliest, whatever the layers below learn.
    """
    grown = dict(state)
    for stream, name in enumerate(_TABLES):
        if name not in state or num_ids == num_known:
            continue
        table = np.asarray(state[name], np.float64)
        known, width = table[:num_known], table.shape[1]
        count = num_ids - num_known
        noise = normals(seed, _FIRST_STREAM + stream, count * width, _NOISE).reshape(count, width)
        away = known.std(axis=0) * noise
        if frozen:
            distance = np.quantile(np.linalg.norm(known - known.mean(axis=0), axis=1), _FROZEN_QUANTILE)
            away *= distance / np.linalg.norm(away, axis=1, keepdims=True)
        rows = known.mean(axis=0) + away
        grown[name] = np.concatenate([known, rows, table[num_ids:]]).astype(state[name].dtype)
    return grown
