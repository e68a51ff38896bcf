"""The chat page in a real browser: all that a user does there, by mouse and by keyboard, on a desktop and on a phone."""

import json
import random
import re
from collections import Counter

import pytest
import torch
from conftest import launch, metrics, python
from served import served, wait_until_idle
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """A server of two models that have learnt to say words without end."""
    folder = tmp_path_factory.mktemp("page")
    for seed, name in enumerate(("base", "other")):
        babbler(tiny, seed).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny.base).save_pretrained(folder / name)
    with served(folder / "log", "--checkpoint", folder / "base", "--checkpoint", folder / "other") as running:
        yield running


def babbler(tiny, seed: int):
    """Return the tiny model after a few steps on its world's words in random order."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(tiny.base)
    config.max_position_embeddings = 8192
    model = AutoModelForCausalLM.from_config(config)
    draw, optimizer = random.Random(seed), torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        texts = [" ".join(draw.choices(tiny.words, k=40)) for _ in range(8)]
        rows = torch.tensor([ids[:40] for ids in tiny.tokenizer(texts, add_special_tokens=False)["input_ids"]])
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["desk", "phone"])
def tab(server, browser, request):
    """The page, opened by somebody who was never there. Afterwards nothing may have gone wrong on it, or been asked of another server."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, has_touch=width < 500)
    tab = context.new_page()
    tab.wrong = []
    tab.on("console", lambda message: tab.wrong.append(message.text))
    tab.on("pageerror", lambda error: tab.wrong.append(str(error)))
    tab.on("request", lambda request: None if request.url.startswith(server.url) else tab.wrong.append(request.url))
    tab.goto(server.url)
    tab.get_by_text("ready").wait_for()
    yield tab
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.wrong == []
    context.close()


def settle(tab) -> None:
    """Wait until nothing is being generated."""
    tab.locator("#send").wait_for(state="visible")


def set_up(tab, **values) -> None:
    tab.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        tab.locator(f"#{name}").fill(str(value))
    tab.get_by_role("button", name="Save").click()


def ask(tab, text: str) -> None:
    tab.locator("#input").fill(text)
    tab.keyboard.press("Enter")


def answers(tab) -> list[str]:
    return tab.locator(".theirs .said").all_inner_texts()


@pytest.mark.slow
def test_a_conversation(tab):
    sent = []
    tab.on("request", lambda request: sent.append(json.loads(request.post_data)) if request.url.endswith("/completions") else None)
    set_up(tab, max_tokens=100, temperature=0)
    ask(tab, "repeat 1 <b>pa</b>")
    settle(tab)
    assert tab.locator(".mine .said").inner_text() == "repeat 1 <b>pa</b>"
    ask(tab, "and again")
    settle(tab)
    first, second = answers(tab)
    assert [message["role"] for message in sent[1]["messages"]] == ["user", "assistant", "user"]
    assert sent[1]["messages"][0]["content"] == "repeat 1 <b>pa</b>" and sent[1]["temperature"] == 0 and sent[1]["max_tokens"] == 100
    assert "cut off" in tab.locator(".theirs").last.inner_text()

    tab.get_by_role("button", name="Retry").click()
    settle(tab)
    assert answers(tab) == [first, second] and len(sent) == 3 and sent[2]["messages"] == sent[1]["messages"]  # greedy says the same again
    set_up(tab, temperature=1.5)
    tab.get_by_role("button", name="Retry").click()
    settle(tab)
    assert answers(tab)[0] == first and answers(tab)[1] != second

    tab.reload()
    tab.get_by_text("ready").wait_for()
    assert len(answers(tab)) == 2 and answers(tab)[0] == first
    tab.get_by_role("button", name="Settings").click()
    assert tab.locator("#temperature").input_value() == "1.5"
    tab.keyboard.press("Escape")
    tab.get_by_role("button", name="Clear").click()
    assert answers(tab) == [] and tab.get_by_text("Talk to the checkpoint.").is_visible()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["button", "Escape"])
def test_stopping(tab, server, by):
    """What has come so far is shown while more comes, and stays when it is stopped."""
    set_up(tab, max_tokens=8_000, temperature=0)  # warmer, it does end by itself now and then
    ask(tab, "say 1 pa")
    tab.locator(".theirs .said", has_text=re.compile("....")).wait_for()
    if by == "button":
        tab.get_by_role("button", name="Stop").click()
    else:
        tab.keyboard.press("Escape")
    settle(tab)
    length = len(answers(tab)[0])
    assert "stopped" in tab.locator(".theirs").inner_text() and length > 3
    tab.wait_for_timeout(300)
    assert len(answers(tab)[0]) == length
    wait_until_idle(server)


@pytest.mark.slow
def test_all_by_keyboard(tab):
    assert tab.evaluate("document.activeElement.id") == "input"
    set_up(tab, max_tokens=5)
    tab.locator("#input").focus()
    tab.keyboard.type("one")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("two")
    tab.keyboard.press("Enter")
    settle(tab)
    assert tab.locator(".mine .said").inner_text() == "one\ntwo"
    reached = set()
    for _ in range(12):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert tab.evaluate("document.activeElement === document.body || document.activeElement.matches(':focus-visible')")
    assert {"mode-chat", "mode-compare", "model", "clear", "open-settings", "Retry"} <= reached
    tab.locator("#open-settings").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#settings").is_visible()
    tab.locator("#max_tokens").fill("0")
    tab.keyboard.press("Enter")
    assert tab.locator("#settings").is_visible()  # not a number that is taken
    tab.keyboard.press("Escape")
    assert not tab.locator("#settings").is_visible()


@pytest.mark.slow
def test_what_the_server_refuses_is_said(tab):
    set_up(tab, max_tokens=5)
    ask(tab, "pa " * 30_000)
    settle(tab)
    assert "this model reads 8,192" in tab.locator(".theirs .error").inner_text()
    tab.wrong.clear()  # the browser notes the status 400 on its console
    with tab.expect_request("**/completions") as sent:
        ask(tab, "pa ke")
    settle(tab)
    assert [message["content"] for message in sent.value.post_data_json["messages"]] == ["pa ke"]  # not what got no answer


@pytest.mark.slow
@pytest.mark.parametrize("tab", [(1280, "light")], indirect=True)
def test_leaving_the_page_keeps_what_has_come(tab):
    set_up(tab, max_tokens=8_000, temperature=0)
    ask(tab, "say 1 pa")
    tab.locator(".theirs .said", has_text=re.compile("....")).wait_for()
    tab.reload()
    tab.get_by_text("ready").wait_for()
    assert tab.locator(".mine .said").inner_text() == "say 1 pa"
    assert "interrupted" in tab.locator(".theirs").inner_text() and len(answers(tab)[0]) > 3
    set_up(tab, max_tokens=5)
    tab.get_by_role("button", name="Retry").click()
    settle(tab)
    assert "interrupted" not in tab.locator(".theirs").inner_text() and len(answers(tab)) == 1


HOSTILE = [
    "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>",
    "[x](javascript:window.ran=1) [y](data:text/html,<script>window.ran=1</script>) [z](JaVaScRiPt:window.ran=1)",
    "```html\n<script>window.ran = 1</script>\n```",
    "<svg onload=window.ran=1> **<iframe srcdoc='<script>parent.ran=1</script>'>**",
    "| <img src=x onerror=window.ran=1> | b |\n|---|---|\n| <style>*{display:none}</style> | [q](vbscript:x) |",
    "![p](https://evil.example/pixel.png) <a href='javascript:window.ran=1'>k</a>",
    "# <script>window.ran=1</script>\n> <b onmouseover=window.ran=1>\n- <script>window.ran=1</script>",
    "# a\u2028b\n```\nnot closed",
    ">" * 9000 + " deep",
    "- " * 9000 + "deep",
]


@pytest.mark.slow
@pytest.mark.parametrize("tab", [(1280, "light")], indirect=True)
def test_nothing_that_a_model_says_becomes_markup_or_script(tab):
    shown = tab.evaluate(
        """async (texts) => {
            const { render } = await import('/page/markdown.js');
            return texts.map((text) => {
                const box = document.createElement('div');
                box.append(...render(text));
                document.body.append(box);
                const kinds = [...box.querySelectorAll('*')].map((node) => node.tagName);
                const all = [...box.querySelectorAll('*')].flatMap((node) => [...node.attributes].map((one) => one.name));
                const result = {kinds, all, links: [...box.querySelectorAll('a')].map((a) => a.href), text: box.textContent};
                box.remove();
                return result;
            });
        }""",
        HOSTILE,
    )
    for one, text in zip(shown, HOSTILE, strict=True):
        assert not {"SCRIPT", "IMG", "IFRAME", "SVG", "STYLE", "B"} & set(one["kinds"])
        assert not [name for name in one["all"] if name.startswith("on") or name in ("src", "srcdoc", "style")]
        assert all(link.startswith("https://evil.example/") for link in one["links"])
        assert "script" not in text or "script" in one["text"]
    assert tab.evaluate("window.ran") is None


@pytest.mark.slow
@pytest.mark.parametrize("tab", [(1280, "light")], indirect=True)
def test_hidden_answers_come_in_any_order_alike(tab):
    """If one model were shown first more often, a liking for the first answer would become one for the model."""
    drawn = """async () => {
        const { shuffled } = await import('/page/shuffled.js');
        return Array.from({length: 30000}, () => shuffled(['a', 'b', 'c']).join(''));
    }"""
    counts = Counter(tab.evaluate(drawn))
    assert len(counts) == 6 and all(abs(count - 5000) < 400 for count in counts.values()), counts


COPY = '<button type="button" class="copy">Copy</button>'
AWAY = 'target="_blank" rel="noopener noreferrer nofollow"'
MARKDOWN = {
    "a *b* **c** `d` ~~e~~ f_g_h": "<p>a <em>b</em> <strong>c</strong> <code>d</code> <s>e</s> f_g_h</p>",
    "# One\n### Three\ntext": "<h3>One</h3><h5>Three</h5><p>text</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "> a\n> b": "<blockquote><p>a<br>b</p></blockquote>",
    "```py\nx = '<b>'\n```\nafter": f"<pre><code data-language=\"py\">x = '&lt;b&gt;'</code>{COPY}</pre><p>after</p>",
    "```\nstill being written": f"<pre><code>still being written</code>{COPY}</pre>",
    "| a | b |\n|---|:-:|\n| 1 | **2** |": '<div class="scroll"><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td>'
    "<td><strong>2</strong></td></tr></tbody></table></div>",
    "see [it](https://a.example/b_c_d).": f'<p>see <a href="https://a.example/b_c_d" {AWAY}>it</a>.</p>',
    "https://a.example/x.": f'<p><a href="https://a.example/x" {AWAY}>https://a.example/x</a>.</p>',
    "2 * 3 * 4 and a_b and __init__.py": "<p>2 * 3 * 4 and a_b and <strong>init</strong>.py</p>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "\\*not\\* `a*b*c`": "<p>*not* <code>a*b*c</code></p>",
    "": "",
}


@pytest.mark.slow
@pytest.mark.parametrize("tab", [(1280, "light")], indirect=True)
def test_markdown(tab):
    shown = tab.evaluate(
        """async (texts) => {
            const { render } = await import('/page/markdown.js');
            return texts.map((text) => { const box = document.createElement('div'); box.append(...render(text)); return box.innerHTML; });
        }""",
        list(MARKDOWN),
    )
    assert dict(zip(MARKDOWN, shown, strict=True)) == MARKDOWN


ENDLESS = {"spaces in a heading": ("# a", " ", "x"), "beginnings that nothing ends": ("", "```*_~~`[", ""), "#s": ("# a ", "# ", "x")}


@pytest.mark.slow
@pytest.mark.parametrize("tab", [(1280, "light")], indirect=True)
@pytest.mark.parametrize("name", ENDLESS)
def test_a_text_of_four_times_the_length_is_drawn_in_about_four_times_the_time(tab, name):
    """The page draws an answer anew at every token. With a pattern that tries every split of a row, 2,000 spaces took over 20 seconds."""
    before, part, after = ENDLESS[name]
    texts = [before + part * (length // len(part)) + after for length in (8_000, 32_000)]
    tab.evaluate(
        """(texts) => setTimeout(async () => {
            const { render } = await import('/page/markdown.js');
            const seconds = (text) => { const began = performance.now(); render(text); return performance.now() - began; };
            window.drawn = texts.map((text) => Math.min(...[1, 2, 3, 4, 5].map(() => seconds(text))));
        })""",
        texts,
    )
    tab.wait_for_function("window.drawn")  # a page that hangs ends the test by Playwright's time limit
    once, four_times = tab.evaluate("window.drawn")
    assert four_times < 10 * once + 5, (once, four_times)  # ms; twice the power of the length would be 16


@pytest.mark.slow
def test_talk_vote_train_again(tab, server, tiny, tmp_path):
    """A user compares two checkpoints with hidden names; the votes become DPO's data, and DPO trains on it."""
    votes = server.folder / "preferences.jsonl"
    votes.unlink(missing_ok=True)
    set_up(tab, max_tokens=12, temperature=0)
    tab.get_by_role("button", name="Compare").click()
    tab.get_by_label("Hide names until the vote").check()
    for turn in range(3):
        ask(tab, f"say {turn} pa")
        settle(tab)
        columns = tab.locator(".answers").last.locator(".answer")
        assert columns.locator(".who").all_inner_texts() == ["Answer A", "Answer B"]
        said = columns.locator(".said").all_inner_texts()
        columns.nth(turn % 2).get_by_role("button").click()
        tab.get_by_text("Vote saved (1 pair)").nth(turn).wait_for()
        assert sorted(columns.locator(".who").all_inner_texts()) == ["base", "other"]
        row = json.loads(votes.read_text().splitlines()[turn])
        assert [message["content"] for message in row["prompt"] if message["role"] == "user"] == [f"say {i} pa" for i in range(turn + 1)]
        assert row["chosen_model"] == columns.nth(turn % 2).locator(".who").inner_text()
        assert [row["chosen"].split(), row["rejected"].split()] == [said[turn % 2].split(), said[1 - turn % 2].split()]
    tab.reload()
    tab.get_by_text("ready").wait_for()
    assert tab.locator(".answer.preferred").count() == 3
    ask(tab, "not voted on")
    settle(tab)
    tab.get_by_role("button", name="Retry").click()
    settle(tab)
    assert tab.locator(".answers").count() == 4 and len(votes.read_text().splitlines()) == 3

    options = ("--dataset", votes, "--tokenizer", tiny.base, "--output_dir", tmp_path / "votes", "--val_size", "0")
    done = python("data_prep/prepare_dpo.py", *options)
    assert done.returncode == 0, done.stdout
    assert json.loads((tmp_path / "votes" / "manifest.json").read_text())["counts"]["train"] == 3
    options = ("--max_iters=3", "--global_batch_size=2", "--warmup_iters=0", "--dtype=float32", "--max_tokens_per_gpu=1024")
    done = launch(
        "posttrain/dpo.py", f"--sft_checkpoint_path={tiny.base}", f"--dpo_data_dir={tmp_path}/votes", f"--out_dir={tmp_path}/run", *options
    )
    assert done.returncode == 0, done.stdout
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3]
