"""The base model's chat template: someone else's program that writes every prompt.

transformers runs it in jinja2's sandbox, where it reaches neither files nor code. It can still
run without end, take all memory, or leave out what was said. So a template is tried once, in a
process of its own with little time and memory, before it is used; and every prompt that it
writes is looked at. What a template does only for certain texts cannot be foreseen.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import lru_cache
from typing import Any

from fedlora_app.foundation.errors import name_kind

MAX_TEMPLATE_CHARS = 100_000
MAX_PROMPT_CHARS = 100_000
TRIAL_CPU_SECONDS = 3
TRIAL_MEMORY_BYTES = 2 << 30
TRIAL_TIMEOUT_SECONDS = 120

QUESTION = "How long is the probation period?"
DIALOGUE = (
    {"role": "system", "content": "You answer for the office of Riverton."},
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "It is six months."},
)


def find_template_fault(template: Any, special_tokens: dict[str, Any]) -> str | None:
    """Return what forbids the use of a chat template, None if nothing does."""
    if not isinstance(template, str):
        return f"is {name_kind(template)} and no text"
    if len(template) > MAX_TEMPLATE_CHARS:
        return f"has {len(template)} characters; at most {MAX_TEMPLATE_CHARS} are read"
    return _try_apart(template, json.dumps(special_tokens, default=str, sort_keys=True))


@lru_cache
def _try_apart(template: str, special_tokens: str) -> str | None:
    """Run this module as a program on the template."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],  # -P: what stands in this folder hides no library
            input=json.dumps({"template": template, "special_tokens": json.loads(special_tokens)}),
            capture_output=True,
            text=True,
            timeout=TRIAL_TIMEOUT_SECONDS,
            env=os.environ | threads,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"could not be tried: {error}"
    if done.returncode < 0:
        return f"wrote no prompt within {TRIAL_CPU_SECONDS} seconds"
    try:
        return json.loads(done.stdout)
    except ValueError:
        return f"could not be tried: {done.stderr.strip().rpartition(chr(10))[2]}"


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows; the parent's timeout remains
        return
    seconds = int(time.process_time()) + TRIAL_CPU_SECONDS
    for limit, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, TRIAL_MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        known = [value] if hard == resource.RLIM_INFINITY else [value, hard]
        resource.setrlimit(limit, (min(known), hard))


def _find_fault(render: Any, template: str, special_tokens: dict[str, Any]) -> str | None:
    """Return what is wrong with the prompts that a template writes."""
    for turns in (DIALOGUE[:2], DIALOGUE, DIALOGUE[1:2], DIALOGUE[1:]):
        chat = [dict(turn) for turn in turns]
        is_prompt = turns[-1]["role"] == "user"
        try:
            [text], _ = render(
                [chat],
                chat_template=template,
                add_generation_prompt=is_prompt,
                enable_thinking=False,  # as prompts are written
                **special_tokens,
            )
        except MemoryError:
            return "takes too much memory"
        except Exception as error:  # whatever an expression raises, beside jinja2's own errors
            if turns[0]["role"] == "system" and type(error).__name__ == "TemplateError":
                continue  # it knows no system prompt; whoever sets one is told at the first prompt
            return f"fails with {type(error).__name__}: {str(error)[:200]}"
        if len(text) > MAX_PROMPT_CHARS:
            return f"makes {len(text)} characters of one question"
        if QUESTION not in text:
            return "leaves out the question"
    return None


def _main() -> None:
    request = json.load(sys.stdin)
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_resources()
    json.dump(_find_fault(render_jinja_template, **request), sys.stdout)


if __name__ == "__main__":
    _main()
