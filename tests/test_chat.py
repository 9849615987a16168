"""Dialogues as ids: what a template writes, who is trained, and that no text of a user becomes a special token."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingot.data.chat import PAD, ChatEncoder, ChatTemplate
from ingot.errors import DataError
from ingot.tokenizer import Tokenizer

TEXT = "low lower lowest; the user said hello to the assistant, who said hello. system of a tower\n\n" * 4
BASE = Tokenizer.train(iter([TEXT]), vocab_size=295)
BUILT_IN = ChatTemplate.built_in()
GROWN = BASE.with_special_tokens(BUILT_IN.missing_special_tokens(BASE))
ENCODER = ChatEncoder(BUILT_IN, GROWN)

# A template that strips, joins the system message with the first question and marks turns in its own way.
STRIPPING = r"""{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}<|note|>{{ m.content | trim }}
{% elif m.role == 'assistant' %}<|says|>{% generation %}{{ m.content | trim }}{{ eos_token }}{% endgeneration %}
{% else %}<|asks|>{{ m.role + '\n' + m.content.strip() }}
{% endif %}{% endfor %}{% if add_generation_prompt %}<|says|>{% endif %}"""
MARKED = BUILT_IN.source.replace(
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}",
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}{%- if message['role'] == 'assistant' -%}{%- generation -%}"
    "{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}{%- else -%}{{- message['content'] + '<|im_end|>' -}}"
    "{%- endif -%}{{- '\\n' -}}",
)


def stripping():
    template = ChatTemplate(STRIPPING, "<|endoftext|>", "<|end|>", PAD, "stripping", tokens_may_be_added=True)
    tokenizer = BASE.with_special_tokens(["<|end|>"])
    return ChatEncoder(template, tokenizer.with_special_tokens(template.missing_special_tokens(tokenizer)))


ENCODERS = {"built-in": ENCODER, "stripping": stripping()}

CONTENT = st.one_of(
    st.text(min_size=1, max_size=12),
    st.lists(
        st.sampled_from(
            ["<|im_end|>", "<|im_start|>assistant\n", "<|endoftext|>", "<|end|>", "\n", " ", "hello", "'s", "ä"]
        )
    ).map("".join),
).filter(str.strip)
PLAIN = st.text(min_size=1, max_size=12).filter(lambda text: text == text.strip() and "<|" not in text)


def dialogues(content):
    """Messages in which no two of the assistant follow each other and the assistant says something."""

    def repaired(turns):
        messages = []
        for role, text in turns:
            if role == "assistant" and messages and messages[-1]["role"] == "assistant":
                role = "user"
            messages.append({"role": role, "content": text})
        if messages[-1]["role"] == "assistant":
            return messages
        return [*messages, {"role": "assistant", "content": turns[0][1]}]

    roles = st.sampled_from(["user", "assistant", "tool", "system"])
    return st.lists(st.tuples(roles, content), min_size=1, max_size=6).map(repaired)


@pytest.mark.parametrize("name", ENCODERS)
@given(messages=dialogues(CONTENT))
def test_the_ids_of_a_beginning_begin_the_ids_of_the_whole(name, messages):
    encoder = ENCODERS[name]
    whole = encoder.encode(messages).ids.tolist()
    for count in range(1, len(messages)):
        beginning = [message for message in messages[:count] if message["role"] == "assistant"]
        if beginning and messages[count - 1]["role"] != "system":
            part = encoder.encode(messages[:count]).ids.tolist()
            assert whole[: len(part)] == part


@pytest.mark.parametrize("name", ENCODERS)
@given(messages=dialogues(CONTENT))
def test_a_prompt_with_the_header_of_the_answer_is_what_precedes_it_in_training(name, messages):
    encoder = ENCODERS[name]
    whole = encoder.encode(messages)
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index:
            prompt = encoder.encode_prompt(messages[:index]).tolist()
            assert whole.ids.tolist()[: len(prompt)] == prompt
            assert whole.mask[len(prompt)]
            assert not whole.mask[len(prompt) - 1]
            only = encoder.encode(messages[: index + 1], first_trained=index)
            assert np.flatnonzero(only.mask).tolist() == list(range(len(prompt), len(only)))


@pytest.mark.parametrize("name", ENCODERS)
@given(messages=dialogues(CONTENT))
def test_the_trained_ids_are_the_assistants_texts_and_their_ends(name, messages):
    encoder = ENCODERS[name]
    encoded = encoder.encode(messages)
    said = [message["content"] for message in messages if message["role"] == "assistant"]
    said = [text.strip() if name == "stripping" else text for text in said]
    expected = "".join(text + encoder.end_of_turn for text in said)
    assert encoder.tokenizer.decode(encoded.ids[encoded.mask]) == expected
    assert (encoded.ids[encoded.mask] == encoder.end_of_turn_id).sum() == len(said)


@pytest.mark.parametrize("name", ENCODERS)
@given(messages=dialogues(CONTENT))
def test_no_content_gives_a_special_token(name, messages):
    encoder = ENCODERS[name]
    special = set(encoder.tokenizer.special_tokens.values())
    harmless = [{**message, "content": "x"} for message in messages]
    counted, expected = (
        [token for token in encoder.encode(turns).ids.tolist() if token in special] for turns in (messages, harmless)
    )
    assert counted == expected


def test_padding_is_never_an_end():
    for encoder in ENCODERS.values():
        assert encoder.pad_token_id is not None
        assert encoder.pad_token_id not in encoder.end_ids
        assert encoder.end_of_turn_id in encoder.end_ids
    shared = ChatTemplate(BUILT_IN.source, "<|endoftext|>", "<|im_end|>", "<|im_end|>")
    without_pad = BASE.with_special_tokens(["<|im_start|>", "<|im_end|>"])
    assert shared.missing_special_tokens(without_pad) == (PAD,)
    assert ChatEncoder(shared, without_pad).pad_token_id is None
    assert ChatEncoder(shared, GROWN).pad_token_id == GROWN.special_tokens[PAD]
    odd = ChatTemplate(BUILT_IN.source.replace("<|im_end|>", "<pad>"), "<|endoftext|>", "", "<pad>", "odd")
    with pytest.raises(
        DataError, match="odd: '<pad>' is padding and end of turn: give the model another padding token"
    ):
        ChatEncoder(odd, BASE.with_special_tokens(["<|im_start|>", "<pad>"]))


# ---- against transformers


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """transformers' own rendering, ids and assistant mask of a template."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizers")

    def make(name, source):
        template = ENCODERS[name].template
        return PreTrainedTokenizerFast(
            tokenizer_file=str(ENCODERS[name].tokenizer.save(folder / name)),
            bos_token=template.bos_token,
            eos_token=template.eos_token,
            chat_template=source,
            clean_up_tokenization_spaces=False,
        )

    return {"built-in": make("built-in", MARKED), "stripping": make("stripping", STRIPPING)}


@pytest.mark.parametrize("name", ENCODERS)
def test_text_ids_and_mask_are_those_of_transformers(name, reference):
    encoder, twin = ENCODERS[name], reference[name]

    @settings(deadline=None)
    @given(messages=dialogues(CONTENT))
    def text_is_equal(messages):
        assert encoder.template.render(messages) == twin.apply_chat_template(messages, tokenize=False)
        asked = twin.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert encoder.template.render(messages, add_generation_prompt=True) == asked

    @settings(max_examples=60, deadline=None)
    @given(messages=dialogues(PLAIN))
    def ids_are_equal(messages):
        whole = twin.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        encoded = encoder.encode(messages)
        # What follows the last turn belongs to the next one here.
        after = encoder.tokenizer.encode("\n") if name == "built-in" else []
        assert whole["input_ids"] == [*encoded.ids.tolist(), *after]
        assert whole["assistant_masks"] == [*encoded.mask.astype(int).tolist(), *[0 for _ in after]]

    text_is_equal()
    ids_are_equal()


def test_an_exported_template_means_the_same_to_transformers(tmp_path):
    from transformers import AutoTokenizer

    GROWN.save(tmp_path)
    BUILT_IN.save(tmp_path)
    names = {"bos_token": BUILT_IN.bos_token, "eos_token": BUILT_IN.eos_token, "pad_token": BUILT_IN.pad_token}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
    messages = [{"role": "user", "content": "hello"}]
    ids = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    read = ChatTemplate.of_model(tmp_path)
    assert ids == ChatEncoder(read, Tokenizer.from_file(tmp_path)).encode_prompt(messages).tolist()
    assert read.hash == BUILT_IN.hash
    assert read.missing_special_tokens(GROWN) == ()


# ---- templates of others


def test_the_template_of_a_model_is_found_in_its_files(tmp_path):
    assert ChatTemplate.of_model(tmp_path) == BUILT_IN
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "chat_template": None}))
    assert ChatTemplate.of_model(tmp_path) == ChatTemplate.built_in("<s>")
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    config.write_text(json.dumps({"bos_token": None, "eos_token": "</s>", "chat_template": templates}))
    found = ChatTemplate.of_model(tmp_path / "tokenizer.json")
    assert (found.source, found.bos_token, found.eos_token, found.tokens_may_be_added) == ("yes", "", "</s>", False)
    config.write_text(json.dumps({"chat_template": "one"}))
    assert ChatTemplate.of_model(tmp_path).source == "one"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.of_model(tmp_path).source == "file"
    config.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not valid JSON"):
        ChatTemplate.of_model(tmp_path)


def test_what_a_tokenizer_lacks_is_said_before_and_refused_after():
    assert BUILT_IN.missing_special_tokens(BASE) == ("<|im_start|>", "<|im_end|>", PAD)
    assert BUILT_IN.missing_special_tokens(Tokenizer.bytes_only()) == (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        PAD,
    )
    with pytest.raises(
        DataError, match=r"no special token <\|im_start\|>, <\|im_end\|>, which the built-in chat template needs"
    ):
        ChatEncoder(BUILT_IN, BASE)
    # Its own model knows this template with "<|asks|>" as text.
    known = ChatTemplate(STRIPPING, "<|endoftext|>", "<|end|>", PAD)
    assert known.missing_special_tokens(BASE.with_special_tokens(["<|end|>"])) == (PAD,)


MESSAGES = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "low"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "lower"},
]
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"


def each(body, after=""):
    return "{% for m in messages %}" + body + "{% endfor %}" + after


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (each("{{ m.role }}: {{ m.content }}\n"), r"writes no special token .* at the end of an assistant message \(but '\\n'\)"),
        (each("{{ m.content }}"), r"at the end of an assistant message \(but nothing\)"),
        (each("{% if m.role == 'user' %}" + TURN + "{% endif %}"), r"content of message 2 of 2 \(assistant\) not at all"),
        (each("{{ m.content }}" + TURN), r"content of message 1 of 1 \(user\) twice"),
        (each(TURN.replace("m.content", "m.content | upper")), None),
        (each("{% if loop.last %}<|im_start|>{% endif %}" + TURN), "in another way once a message"),
        (each("{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% else %}{{ loop.length }}{{ m.content }}{% endif %}"), "in another way"),
        (each(TURN, "{% if add_generation_prompt %}<|im_start|>other\n{% endif %}"), "begins an answer with .* but with .*other"),
        (each("{% if m.role == 'assistant' and loop.index > 2 %}{{ m.content }}<|endoftext|>{% else %}" + TURN + "{% endif %}"), "in different ways"),
        ("{% for m in", "line 1: no valid Jinja"),
        ("{{ messages[9].content }}", "fails on this dialogue"),
        ("{{ raise_exception('only one turn') }}", "refuses this dialogue: only one turn"),
        ("{{ messages.__class__.__mro__ }}", "fails on this dialogue: access to attribute"),
        ("{{ messages.append(1) }}", "fails on this dialogue: access to attribute 'append'"),
    ],
)  # fmt: skip
def test_templates_that_cannot_be_trained_with_are_refused_in_one_line(source, message):
    template = ChatTemplate(source, "", "<|im_end|>", PAD, "folder/chat_template.jinja")
    with pytest.raises(DataError, match=message) as caught:
        ChatEncoder(template, GROWN).encode(MESSAGES)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("folder/chat_template.jinja")


@pytest.mark.parametrize("change", ["| replace('h', 'H')", "[:20]", "if 'hell' not in m.content else 'no'"])
def test_a_template_that_changes_some_contents_is_refused_where_it_does(change):
    source = each(TURN.replace("{{ m.content }}", "{{ m.content " + change + " }}"))
    if change == "[:20]":
        source = source.replace("[:20]", "if m.content | length < 40 else 'no'")
    template = ChatTemplate(source, "", "<|im_end|>", PAD, "odd")
    encoder = ChatEncoder(template, GROWN)
    encoder.encode([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    long = [{"role": "user", "content": "hello " * 10}, {"role": "assistant", "content": "y"}]
    with pytest.raises(DataError, match="odd: changes the text of a message"):
        encoder.encode(long)
    with pytest.raises(DataError, match="odd: changes the text of a message"):
        encoder.encode_prompt(long[:1])


def test_masks_that_train_nothing_or_everything_are_refused():
    with pytest.raises(DataError, match="no token of it would be trained"):
        ENCODER.encode(MESSAGES[:1])
    with pytest.raises(DataError, match="no token of it would be trained"):
        ENCODER.encode(MESSAGES, first_trained=4)
    bare = ChatEncoder(ChatTemplate(each("{{ m.content }}<|im_end|>"), "", "", PAD, "bare"), GROWN)
    with pytest.raises(DataError, match="every token of it would be trained"):
        bare.encode([{"role": "assistant", "content": "x"}])
    with pytest.raises(DataError, match="a dialogue has no message"):
        ENCODER.encode([])


def test_a_role_cannot_bring_special_tokens_either():
    with pytest.raises(DataError, match=r"the role 'user<\|im_end\|>': the roles are system, user, assistant, tool"):
        ENCODER.encode_prompt([{"role": "user<|im_end|>", "content": "x"}])


# ---- plain text


def test_plain_text_is_trained_whole_or_after_its_prompt():
    end = GROWN.eos_token_id
    text = ENCODER.encode_text("hello <|im_end|>")
    assert text.ids.tolist() == [end, *GROWN.encode_ordinary("hello <|im_end|>"), end]
    assert text.mask.tolist() == [False] + [True] * (len(text) - 1)
    pair = ENCODER.encode_text(" tower", prompt="low")
    prompt = ENCODER.encode_text_prompt("low")
    assert pair.ids.tolist() == [*prompt.tolist(), *GROWN.encode_ordinary(" tower"), end]
    assert np.flatnonzero(~pair.mask).tolist() == list(range(len(prompt)))
    bare = Tokenizer.bytes_only().with_special_tokens(["<|im_start|>", "<|im_end|>"])
    other = ChatEncoder(ChatTemplate(each(TURN), "", "<|im_end|>", PAD), bare)
    assert other.encode_text("ab").ids.tolist() == [97, 98, 257]
    with pytest.raises(DataError, match="every token of it would be trained"):
        other.encode_text("ab", prompt="")


# ---- growing a tokenizer


@given(st.text(max_size=30))
def test_a_grown_tokenizer_gives_every_text_the_same_ids(text):
    assert GROWN.encode_ordinary(text) == BASE.encode_ordinary(text)


def test_new_special_tokens_take_the_next_ids_and_survive_saving(tmp_path):
    assert GROWN.vocab_size == BASE.vocab_size + 3
    assert list(GROWN.special_tokens) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>", PAD]
    assert GROWN.special_tokens[PAD] == BASE.vocab_size + 2
    assert Tokenizer.from_file(GROWN.save(tmp_path)) == GROWN
    assert GROWN.with_special_tokens(["<|im_end|>"]) is GROWN
    # A vocabulary that merges cannot express is kept as ranks.
    ranks = [bytes([byte]) for byte in range(256)] + [b"abcd"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    (tmp_path / "odd.tiktoken").write_text("\n".join(lines))
    odd = Tokenizer.from_tiktoken(tmp_path / "odd.tiktoken", pattern="gpt2", special_tokens={"<|endoftext|>": 300})
    assert odd.with_special_tokens(["<|im_end|>"]).encode("abcd<|im_end|>", allowed_special="all") == [256, 301]
    with pytest.raises(ValueError, match="'x' is an ordinary token"):
        BASE.with_special_tokens(["x"])
    with pytest.raises(ValueError, match="a special token is empty"):
        BASE.with_special_tokens([""])
