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


def grow_vocabulary(
    state: Mapping[str, npt.NDArray[np.generic]], *, num_known: int, num_ids: int, seed: int
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
    """
    grown = dict(state)
    for stream, name in enumerate(_TABLES):
        if name not in state or num_ids == num_known:
            continue
        table = np.asarray(state[name], np.float64)
        known, width = table[:num_known], table.shape[1]
        count = num_ids - num_known
        noise = normals(seed, _FIRST_STREAM + stream, count * width, _NOISE).reshape(count, width)
        rows = known.mean(axis=0) + known.std(axis=0) * noise
        grown[name] = np.concatenate([known, rows, table[num_ids:]]).astype(state[name].dtype)
    return grown
