"use strict";

// Draws /openapi.json. Everything it shows is text: nothing is ever parsed as HTML.

const byId = (id) => document.getElementById(id);

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made[key] = value;
  made.append(...children);
  return made;
}

function headers(extra = {}) {
  const key = byId("key").value;
  return key ? { ...extra, "x-api-key": key } : extra;
}

function kind(schema) {
  if (!schema) return "";
  if (schema.anyOf) return schema.anyOf.map(kind).join(" or ");
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" or ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.type === "array") return `list of ${kind(schema.items) || "anything"}`;
  return schema.type || "anything";
}

// A body that shows the required fields: a start for one's own.
function example(schema, name = "") {
  if (schema.example !== undefined) return schema.example;
  if (schema.anyOf) return example(schema.anyOf[0], name);
  if (schema.enum) return schema.enum.includes("user") ? "user" : schema.enum[0];
  if (schema.const !== undefined) return schema.const;
  switch (schema.type) {
    case "object": {
      const required = schema.required || [];
      const fields = Object.entries(schema.properties || {});
      return Object.fromEntries(
        fields.filter(([key]) => required.includes(key)).map(([key, one]) => [key, example(one, key)]),
      );
    }
    case "array": return [example(schema.items || {}, name)];
    case "integer": case "number": return schema.minimum ?? 1;
    case "boolean": return false;
    default: return name === "model" ? byId("key").dataset.model || "MODEL" : "Hello";
  }
}

function fields(schema) {
  const required = schema.required || [];
  const rows = Object.entries(schema.properties || {}).map(([name, one]) =>
    element("tr", {},
      element("td", {}, element("code", { textContent: name }), required.includes(name) ? " *" : ""),
      element("td", { textContent: kind(one) }),
      element("td", { className: "quiet", textContent: one.description || "" })));
  return element("table", {}, element("tbody", {}, ...rows));
}

async function send(method, path, body, output, button) {
  button.disabled = true;
  output.textContent = "…";
  try {
    const options = { method, headers: headers() };
    if (body !== null) {
      options.body = body;
      options.headers = headers({ "content-type": "application/json" });
    }
    const answer = await fetch(path, options);
    output.textContent = `${answer.status} ${answer.statusText}\n\n`;
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      output.append(value);
    }
  } catch (error) {
    output.textContent = String(error);
  } finally {
    button.disabled = false;
  }
}

function route(method, path, operation) {
  const schema = operation.requestBody?.content?.["application/json"]?.schema;
  const output = element("pre", { hidden: true });
  const box = schema && element("textarea", {
    value: JSON.stringify(example(schema), null, 2), spellcheck: false, ariaLabel: "Body",
  });
  const place = element("input", { value: path, size: 40, ariaLabel: "Path" });
  const button = element("button", { type: "button", textContent: "Send" });
  button.addEventListener("click", () => {
    output.hidden = false;
    send(method.toUpperCase(), place.value, box ? box.value : null, output, button);
  });
  const answers = Object.entries(operation.responses || {}).map(([status, one]) =>
    element("tr", {},
      element("td", { textContent: status }),
      element("td", { textContent: one.description || "" }),
      element("td", { className: "quiet", textContent: Object.keys(one.content || {}).join(", ") })));
  const parts = [element("p", { textContent: operation.description || "" })];
  if (schema) parts.push(element("h4", { textContent: "Body" }), fields(schema), box);
  parts.push(element("p", {}, place, " ", button), output);
  parts.push(element("details", {},
    element("summary", { textContent: "Answers" }),
    element("table", {}, element("tbody", {}, ...answers))));
  return element("details", {},
    element("summary", {},
      element("span", { className: "method", textContent: method.toUpperCase() }),
      element("code", { textContent: path }), " ",
      element("span", { className: "quiet", textContent: operation.summary || "" })),
    ...parts);
}

async function load() {
  const status = byId("status");
  try {
    const answer = await fetch("/openapi.json", { headers: headers() });
    if (answer.status === 401) {
      status.textContent = "This endpoint needs its API key: enter it above.";
      return;
    }
    const description = await answer.json();
    const models = await fetch("/v1/models", { headers: headers() });
    if (models.ok) byId("key").dataset.model = (await models.json()).data[0]?.id || "";
    const groups = new Map();
    for (const [path, methods] of Object.entries(description.paths)) {
      for (const [method, operation] of Object.entries(methods)) {
        const tag = operation.tags?.[0] || "Others";
        if (!groups.has(tag)) groups.set(tag, []);
        groups.get(tag).push(route(method, path, operation));
      }
    }
    byId("routes").replaceChildren(...[...groups].flatMap(
      ([tag, routes]) => [element("h2", { textContent: tag }), ...routes]));
    status.textContent = `Version ${description.info.version}.`;
  } catch (error) {
    status.textContent = `The endpoint's description cannot be read: ${error}`;
  }
}

byId("key").addEventListener("change", load);
load();
