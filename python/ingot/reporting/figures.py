"""Which charts tell what a run did, and how to read each: for someone who never trained a model."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Line:
    """A metric in a chart. Its held-out twin, ``eval_`` before its name, is drawn beside it where there is one."""

    metric: str
    """Its name in metrics.jsonl; with * it stands for all names of that shape."""
    label: str = ""
    """In the chart; {} is what * stands for."""
    held_out: str = ""
    """Name of the held-out twin where it is another one."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart of metrics."""

    title: str
    y_title: str
    lines: tuple[Line, ...]
    read: str
    """How to read it, in plain words."""
    kinds: tuple[str, ...] = ()
    """Phases that have it; all unless given."""
    x: str = "step"
    """The metric along the x axis."""
    x_title: str = ""
    levels: tuple[tuple[float, str], ...] = ()
    """What to compare with."""
    levels_from: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Names of settings or of the verdict's figures that are to be compared with, and what to call them."""
    cut: bool = False
    """Cut off the first, untrained steps where they would press the rest to the ground."""
    folded: bool = False
    """Of interest to those who look for a fault."""
    unless: str = ""
    """A metric that says the same better: where a run has it, this is folded."""
    alarms: tuple[str, ...] = ()
    """Names of alarms that speak of it without naming a metric; * stands for anything."""


_PAIRS = ("reward", "dpo")
_ONLINE = ("ppo", "grpo")
_LN2 = ((math.log(2), "ln 2: a coin"),)
_CHANCE = ((0.5, "a coin"),)


def _scores(proxy: str) -> tuple[Line, ...]:
    return (
        Line("objective/scores", proxy, "eval_score"),
        Line("objective/judge", "judge", "eval_judge"),
        Line("objective/gold", "gold", "eval_gold"),
    )


FIGURES: tuple[Figure, ...] = (
    # What is rewarded, first of all.
    Figure(
        "Scores side by side",
        "score",
        _scores("proxy (trained on)"),
        "The proxy is what the model is paid for, so it should rise. The judge and gold are not paid for: they tell whether the answers "
        "really became better. If the proxy climbs while the others fall, the model has found a way to please the scorer instead "
        "(over-optimisation).",
        ("ppo", "grpo"),
        alarms=("over-optimisation*",),
    ),
    Figure(
        "Reward",
        "reward",
        (Line("reward", "mean reward"), Line("rewards/*/mean", "{}")),
        "What the answers earn on average. It should rise and then level off; noise from step to step is normal, since each step draws new "
        "answers.",
        ("grpo",),
    ),
    Figure(
        "Score against distance",
        "score",
        _scores("proxy"),
        "To the right the model is further from the one it started as; upwards the scores are better. A good run climbs steeply near the "
        "left. Where the line bends down again, going further did harm.",
        _ONLINE,
        x="objective/kl",
        x_title="KL to the reference, nats per answer",
    ),
    Figure(
        "Reward against distance",
        "reward",
        (Line("reward", "mean reward"),),
        "To the right the model is further from the one it started as; upwards the rewards are better. A good run climbs steeply near the "
        "left. Where the line bends down again, going further did harm.",
        _ONLINE,
        x="kl",
        x_title="KL to the reference",
        unless="objective/scores",
    ),
    # The loss.
    Figure(
        "Loss",
        "nats per token",
        (Line("loss", "training"),),
        "How surprised the model is by each next token: lower is better. The held-out line is text that it never learned from; when "
        "that line turns up while training goes on falling, it has begun to learn by heart.",
        ("pretrain", "sft", "run"),
        cut=True,
    ),
    Figure(
        "Loss by source",
        "nats per token",
        (Line("eval_*_loss", "{}"),),
        "The held-out loss of each file of examples. A file whose line rises while others fall is being traded away.",
        ("sft",),
        cut=True,
    ),
    Figure(
        "Loss",
        "nats per comparison or label",
        (Line("loss", "training"),),
        "How surprised the reward model is by each judgement. Without any knowledge it is ln 2 = 0.693, a coin's; lower is better. A "
        "held-out line that rises means it has begun to learn the judgements by heart.",
        ("reward",),
        levels=_LN2,
    ),
    Figure(
        "Loss",
        "loss",
        (Line("loss", "training"), Line("nll_loss", "of the chosen answers alone")),
        "What training pushes down. For the plain form it starts at ln 2 = 0.693, where the model has no preference beyond the "
        "reference's.",
        ("dpo",),
    ),
    # Reward models.
    Figure(
        "Judged as people did",
        "share of pairs or labels",
        (Line("accuracy", "training"),),
        "Of two responses, how often the one that people preferred scores higher; of responses or steps with labels, how often the score is "
        "above 0 for a true one and below for a false one. A coin gets 0.5. The held-out line counts; it should "
        "clearly beat the simple rules, and people themselves seldom agree on much more than three pairs of four.",
        ("reward",),
        levels=_CHANCE,
        levels_from={
            "accuracy_longer_wins*": "prefers the longer",
            "accuracy_shorter_wins*": "prefers the shorter",
            "accuracy_bag_of_words*": "counts words",
            "accuracy_majority*": "always says the same",
            "accuracy_length*": "looks at length",
            "people_agreement": "people with each other",
        },
    ),
    Figure(
        "True above false",
        "area under the ROC curve",
        (Line("auc", "training"),),
        "How often a response or step labelled true scores above one labelled false. A coin gets 0.5, whatever share is true.",
        ("reward",),
        levels=_CHANCE,
        levels_from={"auc_length*": "looks at length", "auc_bag_of_words*": "counts words"},
    ),
    Figure(
        "Judged as people did, by criterion",
        "share of held-out pairs or labels",
        (Line("eval_accuracy/*", "{}, held out"),),
        "The same for each thing that people judged. One may be learned well and another not at all.",
        ("reward",),
        levels=_CHANCE,
    ),
    Figure(
        "Margin",
        "score difference",
        (Line("margin", "training"), Line("eval_margin_std", "its deviation, held out")),
        "By how much the preferred response scores higher, on average. It grows while the reward model learns; without end, it has become "
        "too sure of itself.",
        ("reward",),
    ),
    Figure(
        "Scores",
        "score",
        (Line("mean_reward", "mean"), Line("min_reward", "lowest"), Line("max_reward", "highest")),
        "The range of scores that it gives. It should open up and stay bounded.",
        ("reward",),
        folded=True,
    ),
    Figure(
        "Calibration error",
        "ECE",
        (Line("ece", "training"),),
        "How far its certainty is from being right: of judgements that it is 80 % sure of, 80 % should be right. Below 0.1 is well.",
        ("reward",),
        levels=((0.1, "alarm"),),
    ),
    Figure(
        "Score and length",
        "correlation",
        (Line("length_correlation", "correlation"), Line("length_slope", "gain of longer answers")),
        "1 would mean that the score is nothing but length, -1 the opposite. Above 0.5, or where it is right far more often when the better "
        "answer is the longer one, it has learned length instead of quality.",
        ("reward",),
        levels=((0.5, "alarm"),),
    ),
    # DPO.
    Figure(
        "Implicit rewards",
        "reward",
        (Line("rewards/chosen", "chosen"), Line("rewards/rejected", "rejected")),
        "How much more likely than the reference the model has made each answer, times beta. The two should part, the chosen one above. "
        "If both fall, the model gains its margin by disliking everything that it was shown.",
        ("dpo",),
        levels=((0.0, "the reference"),),
    ),
    Figure(
        "Margin of the rewards",
        "chosen - rejected",
        (Line("rewards/margins", "training"),),
        "The distance between the two lines of the figure before. It should rise and level off.",
        ("dpo",),
    ),
    Figure(
        "Pairs in the right order",
        "share of pairs",
        (Line("rewards/accuracies", "training"), Line("accuracy", "all pairs")),
        "How often the chosen answer has the higher implicit reward. A coin gets 0.5; held out it seldom goes much beyond what people "
        "agree on.",
        ("dpo",),
        levels=_CHANCE,
        levels_from={"eval_length_accuracy": "prefers the longer", "eval_start_accuracy": "the model at the start"},
    ),
    Figure(
        "Log-probability of both answers",
        "nats per answer",
        (Line("logps/chosen", "chosen"), Line("logps/rejected", "rejected")),
        "How likely the model finds the answers themselves. The rejected one should fall. If the chosen one falls as fast, probability "
        "goes to answers that nobody judged (likelihood displacement).",
        ("dpo",),
    ),
    # Reinforcement learning.
    Figure(
        "Distance from the start (KL)",
        "nats per answer",
        (Line("objective/kl", "k1", "eval_kl"), Line("objective/kl_k3", "k3")),
        "How far the model has moved from the one it started as. It should rise and then stay near its target; without end means "
        "that the scorer is being gamed or kl_coef is too small. The two estimates should agree roughly.",
        _ONLINE,
        levels_from={"kl_target": "target"},
        alarms=("KL*",),
    ),
    Figure(
        "Distance from the start (KL)",
        "nats",
        (Line("kl", "KL"),),
        "How far the model has moved from the one it started as. It should rise slowly and level off.",
        ("dpo",),
    ),
    Figure(
        "KL in the loss",
        "nats per token",
        (Line("kl", "KL", "eval_kl_loss"),),
        "How far the model has moved from the one it started as, as its loss sees it. It should rise slowly and level off.",
        ("grpo",),
        unless="objective/kl",
    ),
    Figure(
        "What is optimised",
        "reward",
        (
            Line("objective/rlhf_reward", "score less KL cost", "eval_objective"),
            Line("objective/non_score_reward", "KL cost"),
        ),
        "PPO raises the score less a price for moving away. The upper line should rise: the gain is worth more than its price.",
        ("ppo",),
    ),
    Figure(
        "Entropy",
        "nats per token",
        (Line("policy/entropy_avg", "per token"), Line("entropy", "per token")),
        "How undecided the model is between words: 0 is one fixed answer. A slow fall is normal; a fall to almost nothing means that it "
        "says the same thing always (collapse).",
        ("ppo", "grpo", "dpo"),
    ),
    Figure(
        "Entropy of an answer",
        "nats per answer",
        (Line("objective/entropy", "per answer"), Line("eval_sample_entropy", "of samples")),
        "The same, added up over an answer: how many different answers it has, on a logarithmic scale.",
        ("ppo", "grpo", "dpo"),
        folded=True,
    ),
    Figure(
        "Length of answers",
        "tokens",
        (
            Line("completions/mean_length", "mean", "eval_mean_length"),
            Line("eval_completions/mean_length", "mean, held out"),
            Line("completions/mean_terminated_length", "mean of those that ended"),
            Line("lengths/chosen", "chosen"),
            Line("lengths/rejected", "rejected"),
        ),
        "How long the answers are. A drift of more than half with a rising score hints that the scorer likes length itself.",
        ("ppo", "grpo", "dpo"),
    ),
    Figure(
        "Answers that end by themselves",
        "share",
        (
            Line("completions/eos_rate", "ended"),
            Line("eos_rate", "ended"),
            Line("completions/clipped_ratio", "cut off"),
        ),
        "Share of the answers that the model ends itself, before the length limit. It should be high and stay so.",
        (),
    ),
    Figure(
        "Groups without a signal",
        "share of prompts",
        (Line("frac_reward_zero_std", "all answers scored alike"),),
        "Where all answers to a prompt earn the same, nothing can be learned from it. Above 0.8 the prompts are too easy or too hard.",
        ("grpo",),
        levels=((0.8, "alarm"),),
    ),
    Figure(
        "Spread of the rewards",
        "deviation",
        (Line("reward_std", "reward"), Line("objective/scores_std", "score")),
        "How much the answers differ in what they earn. At 0 there is nothing to choose between.",
        _ONLINE,
        alarms=("no signal",),
        folded=True,
    ),
    Figure(
        "Clipped updates",
        "share of tokens",
        (
            Line("policy/clipfrac_avg", "of all"),
            Line("policy/clipfrac_low", "below"),
            Line("policy/clipfrac_high", "above"),
            Line("clip_ratio/region_mean", "of all"),
            Line("clip_ratio/low_mean", "below"),
            Line("clip_ratio/high_mean", "above"),
        ),
        "Share of tokens whose probability wanted to move further than one update may. 0.05 to 0.3 is usual; above 0.5 the learning rate "
        "or the number of passes is too high.",
        _ONLINE,
    ),
    Figure(
        "Size of an update",
        "approximate KL",
        (Line("policy/approxkl_avg", "to the model that sampled"), Line("policy/approxkl_k3", "k3")),
        "How far one update moves the model. Below 0.02 is calm, above 0.1 is too far.",
        _ONLINE,
        levels=((0.1, "alarm"),),
    ),
    Figure(
        "Critic: variance explained",
        "share",
        (Line("val/explained_variance", "explained"), Line("explained_variance", "explained")),
        "How well the critic foresees what an answer will earn: 1 is perfectly, 0 not at all. Below 0 it does harm.",
        ("ppo",),
        levels=((0.0, "useless"),),
        alarms=("useless critic",),
    ),
    Figure(
        "Critic: loss",
        "squared error",
        (Line("loss/value_avg", "value loss"),),
        "The critic's mistakes. It should fall, or stay low while the scores change.",
        ("ppo",),
    ),
    Figure(
        "Diversity of answers",
        "share",
        (
            Line("completions/distinct_2", "different word pairs", "eval_distinct_2"),
            Line("completions/repetition", "repeated pairs", "eval_repetition"),
        ),
        "Of all pairs of neighbouring tokens, how many are different ones, and how many repeat within an answer. A fall of the first or a "
        "rise of the second is the model repeating itself.",
        _ONLINE,
    ),
    Figure(
        "Score and length",
        "correlation",
        (Line("objective/score_length_correlation", "correlation"),),
        "1 would mean that the score is nothing but length. Above 0.5 is a warning.",
        _ONLINE,
        alarms=("length is rewarded",),
        levels=((0.5, "alarm"),),
        folded=True,
    ),
    # For all that predict tokens.
    Figure(
        "Tokens foreseen",
        "share of tokens",
        (Line("mean_token_accuracy", "training"),),
        "How often the model's first guess of the next token is the right one. 1 is impossible where many continuations are good.",
        ("sft",),
    ),
    Figure(
        "Entropy",
        "nats per token",
        (Line("entropy", "training"),),
        "How undecided the model is between words. It usually falls with the loss; far below the loss, the model is surer than it is right.",
        ("sft",),
        folded=True,
    ),
    # For all.
    Figure(
        "Pretraining text",
        "bits per byte",
        (Line("eval_ptx_bpb", "held out"),),
        "How well the model still predicts plain text. A rise is the price of alignment; above 0.1 more than at the start is an alarm.",
        alarms=("alignment tax",),
    ),
    Figure(
        "Learning rate",
        "per step",
        (Line("learning_rate", "learning rate"), Line("lr", "learning rate")),
        "How large a step training takes each time: a warm-up, then a fall, as planned.",
        folded=True,
    ),
    Figure(
        "KL coefficient",
        "coefficient",
        (Line("objective/kl_coef", "kl_coef"), Line("kl_coef", "kl_coef")),
        "The price of moving away from the start. Where a target is set, it is raised and lowered to hold it.",
        _ONLINE,
        folded=True,
    ),
    Figure(
        "Gradient norm",
        "norm",
        (Line("grad_norm", "of all"), Line("grad_norm/*", "{}"), Line("*_grad_norm", "{}")),
        "How hard each step pulls. Single peaks are cut off and do no harm; a steady rise is the beginning of trouble.",
        folded=True,
        cut=True,
    ),
    Figure(
        "Speed",
        "tokens per second",
        (Line("time/tokens_per_s", "tokens per second"),),
        "How fast the run went on its machine. Dips are evaluations, checkpoints, or other work of the machine.",
        folded=True,
    ),
)

_REWARDED = (
    ("eval_score|objective/scores|reward", "score by the proxy"),
    ("eval_judge|objective/judge", "score by the judge"),
    ("eval_gold|objective/gold", "score by gold"),
    ("eval_kl|objective/kl|kl", "KL to the reference, nats per answer"),
    ("eval_mean_length|completions/mean_length", "tokens of an answer"),
    ("eval_entropy|entropy", "entropy, nats per token"),
)

HEADLINES: Mapping[str, Sequence[tuple[str, str]]] = {
    "pretrain": (("eval_loss|loss", "loss, nats per token"),),
    "sft": (
        ("eval_loss|loss", "loss, nats per token"),
        ("eval_mean_token_accuracy|mean_token_accuracy", "tokens foreseen"),
        ("eval_eos_rate|eos_rate", "answers that end by themselves"),
    ),
    "reward": (
        ("eval_accuracy|accuracy", "judged as people did"),
        ("eval_auc|auc", "true above false"),
        ("eval_loss|loss", "loss (a coin: 0.693)"),
        ("eval_ece|ece", "calibration error"),
        ("eval_margin|margin", "margin between the two scores"),
    ),
    "dpo": (
        ("eval_rewards/accuracies|rewards/accuracies", "pairs in the right order"),
        ("eval_rewards/margins|rewards/margins", "margin of the implicit rewards"),
        ("eval_logps/chosen|logps/chosen", "log-probability of chosen answers"),
        ("eval_logps/rejected|logps/rejected", "log-probability of rejected answers"),
        ("eval_kl|kl", "KL to the reference"),
    ),
    "ppo": _REWARDED,
    "grpo": (*_REWARDED, ("frac_reward_zero_std", "groups without a signal")),
}
"""Metrics whose first and last value say most (of several names, the first that a run has), and what to call them."""

PHASES: Mapping[str, tuple[str, str]] = {
    "pretrain": (
        "Pretraining",
        "A network read raw text and learned to predict the next token. It can continue a text; it was taught nothing about what is true "
        "or wanted.",
    ),
    "sft": (
        "Supervised fine-tuning",
        "A pretrained model was shown demonstrations, questions with good answers, and learned to answer in their manner.",
    ),
    "reward": (
        "Reward model",
        "People compared responses, or said of each, or of its steps, whether it is good. From their judgements a model learned to give "
        "scores, higher for what people prefer. The score then stands in for people when the next model is trained.",
    ),
    "dpo": (
        "Preference optimisation",
        "The model saw pairs of answers of which people preferred one, and learned to make that one more likely than the other, without a "
        "reward model in between.",
    ),
    "ppo": (
        "Reinforcement learning (PPO)",
        "The model wrote answers, a reward scored them, and what scored well became a little more likely, again and again, at a price "
        "for moving away from the model that it started as.",
    ),
    "grpo": (
        "Reinforcement learning in groups",
        "The model wrote several answers to each prompt; those that earned more than the others of their group became a little more "
        "likely, again and again.",
    ),
    "run": ("Training run", "What kind of run this was is not recorded."),
}
"""For each kind of run its name and what happened in it."""

BINS = ("eval_accuracy_when_*", "accuracy_when_*")
"""Names of accuracies by difference of length, of a criterion where a slash and its name follow."""


def expand(line: Line, names: Sequence[str]) -> list[Line]:
    """The lines of a chart that a run has metrics for, each with its held-out twin."""
    found = []
    before, _, after = line.metric.partition("*")
    own = [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in BINS)]
    for metric in fnmatch.filter(own, line.metric) if "*" in line.metric else [line.metric]:
        middle = metric[len(before) : len(metric) - len(after)] if "*" in line.metric else ""
        label = (line.label or metric).replace("{}", middle)
        if metric in names:
            found.append(Line(metric, label))
        twin = line.held_out or f"eval_{metric}"
        if twin in names:
            found.append(Line(twin, "held out" if label == "training" else f"{label}, held out"))
    return found
