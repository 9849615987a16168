"""A policy small enough to list: two free tokens at most from three letters, then an end. All forty responses, as one packed batch."""

from __future__ import annotations

import itertools

import numpy as np

NUM_ACTIONS, END = 4, 3
"""Letters 0 to 2 and the end."""

RESPONSES = [
    actions
    for length in (1, 2, 3)
    for actions in itertools.product(range(NUM_ACTIONS), repeat=length)
    if END not in actions[:-1] and (actions[-1] == END or length == 3)
]
STATES = [(), *((a,) for a in range(3)), *itertools.product(range(3), repeat=2)]
TARGETS = np.array([action for response in RESPONSES for action in response], np.int32)
STATE_OF_TOKEN = np.array([STATES.index(response[:t]) for response in RESPONSES for t in range(len(response))])
OFFSETS = np.concatenate([[0], np.cumsum([len(response) for response in RESPONSES])])
ENDED = np.array([response[-1] == END for response in RESPONSES])


def log_softmax(theta: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    shifted = theta - theta.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def token_logprobs(theta: np.ndarray) -> np.ndarray:
    """ln pi of each token of the pack, from theta [states, actions]."""
    return log_softmax(theta)[STATE_OF_TOKEN, TARGETS]


def response_logprobs(theta: np.ndarray) -> np.ndarray:
    """ln pi of each of the forty responses; their probabilities sum to 1."""
    return np.add.reduceat(token_logprobs(theta), OFFSETS[:-1])


def d_theta(theta: np.ndarray, d_logprobs: np.ndarray) -> np.ndarray:
    """The gradient by theta from that by the tokens' log-probabilities."""
    gradient = np.zeros_like(theta)
    np.add.at(gradient, (STATE_OF_TOKEN, TARGETS), d_logprobs)
    return gradient - gradient.sum(-1, keepdims=True) * np.exp(log_softmax(theta))


def adam(theta: np.ndarray, gradient, *, steps: int, lr: float) -> np.ndarray:
    """Plain Adam with a rate that falls to 0; ``gradient`` is a function of theta."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for step in range(1, steps + 1):
        g = gradient(theta)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        rate = lr * (1 - (step - 1) / steps)
        theta = theta - rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-12)
    return theta
