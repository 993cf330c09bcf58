// npm's openai. Arguments: URL, model.
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [url, model] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
const messages = [{ role: "user", content: "Hi" }];
const { version } = JSON.parse(readFileSync("node_modules/openai/package.json"));

const models = [];
for await (const one of client.models.list()) models.push(one.id);
const whole = await client.chat.completions.create({ model, messages });
const runner = client.chat.completions.stream({ model, messages });
const stream = await runner.finalContent();
const response = await client.responses.create({ model, input: "Hi" });
const events = client.responses.stream({ model, input: "Hi" });
const last = await events.finalResponse();
console.log(JSON.stringify({
  version, models, chat: whole.choices[0].message.content, stream,
  response: response.output_text, "response stream": last.output_text,
}));
