// npm's ollama. Arguments: URL, model.
import { readFileSync } from "node:fs";
import { Ollama } from "ollama";

const [host, model] = process.argv.slice(2);
const client = new Ollama({ host });
const messages = [{ role: "user", content: "Hi" }];
const { version } = JSON.parse(readFileSync("node_modules/ollama/package.json"));

const models = (await client.list()).models.map((one) => one.model);
const whole = await client.chat({ model, messages });
let stream = "";
for await (const part of await client.chat({ model, messages, stream: true })) {
  stream += part.message.content;
}
const generated = await client.generate({ model, prompt: "Once" });
const shown = await client.show({ model });
console.log(JSON.stringify({
  version, models, chat: whole.message.content, stream, generate: generated.response,
  family: shown.details.family,
}));
