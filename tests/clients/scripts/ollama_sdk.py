"""The ollama package. Arguments: URL, model."""

import json
import sys
from importlib.metadata import version

import ollama

url, model = sys.argv[1:]
client = ollama.Client(host=url)
ask = [{"role": "user", "content": "Hi"}]


def weather(city: str) -> str:
    """The weather of a city.

    Args:
        city: Its name.
    """
    return "sun"


found = {"version": version("ollama"), "models": [one.model for one in client.list().models]}
found["family"] = client.show(model).details.family
found["chat"] = client.chat(model, ask).message.content
found["stream"] = "".join(part.message.content for part in client.chat(model, ask, stream=True))
call = client.chat(model, ask, tools=[weather])
found["calls"] = [[one.function.name, one.function.arguments] for one in call.message.tool_calls]
told = {"role": "tool", "tool_name": "weather", "content": "sun"}
found["after the call"] = client.chat(model, [*ask, call.message, told]).message.content
found["generate"] = client.generate(model, "Once").response
found["generate stream"] = "".join(one.response for one in client.generate(model, "A", stream=True))
found["running"] = [one.model for one in client.ps().models]
try:
    client.pull("llama3.2")
except ollama.ResponseError as error:
    found["pull"] = error.status_code
print(json.dumps(found))
