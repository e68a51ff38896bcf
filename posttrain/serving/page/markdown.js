// Turns Markdown into DOM nodes. Text only ever becomes text nodes, so nothing that a model writes can become markup or script.

const make = (tag, ...children) => {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
};

// The first match of any of these in a text becomes a node; the text before it stays text, and the text after it is searched in turn.
const INLINE = [
  [/(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/, (m) => make("code", m[2].replace(/^ (.*) $/, "$1"))],
  [/\\([\\`*_{}[\]()#+\-.!|~>])/, (m) => m[1]],
  [/\[([^\]\n]+)\]\(\s*<?([^\s)>]+)>?(?:\s+"[^"\n]*")?\s*\)/, (m) => link(m[2], inline(m[1]), m[0])],
  [/\bhttps?:\/\/[^\s<>()"']*[^\s<>()"'.,;:!?]/, (m) => link(m[0], [m[0]], m[0])],
  [/\*\*(?=\S)([\s\S]*?\S)\*\*/, (m) => make("strong", ...inline(m[1]))],
  [/(?<!\w)__(?=\S)([\s\S]*?\S)__(?!\w)/, (m) => make("strong", ...inline(m[1]))],
  [/\*(?=[^\s*])([^*]*?[^\s*])\*/, (m) => make("em", ...inline(m[1]))],
  [/(?<!\w)_(?=[^\s_])([^_]*?[^\s_])_(?!\w)/, (m) => make("em", ...inline(m[1]))],
  [/~~(?=\S)([\s\S]*?\S)~~/, (m) => make("s", ...inline(m[1]))],
];

function link(address, children, source) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return source;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return source; // javascript:, data: and others stay text
  const node = make("a", ...children);
  Object.assign(node, { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" });
  return node;
}

function inline(text) {
  const nodes = [];
  while (text) {
    let first = null;
    for (const [pattern, build] of INLINE) {
      const match = pattern.exec(text);
      if (match && (!first || match.index < first.match.index)) first = { match, build };
    }
    if (!first) break;
    const { match, build } = first;
    nodes.push(text.slice(0, match.index), build(match));
    text = text.slice(match.index + match[0].length);
  }
  nodes.push(text);
  return nodes.filter((node) => node !== "");
}

const lines = (list) => list.flatMap((text, i) => (i ? [document.createElement("br"), ...inline(text)] : inline(text)));
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const FENCE = /^\s*(```+|~~~+)\s*([\w+#.-]*)[^`]*$/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const TABLE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const cells = (row) => row.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim());

function code(text, language) {
  const body = make("code", text);
  const copy = make("button", "Copy");
  copy.type = "button";
  copy.className = "copy";
  if (language) body.dataset.language = language;
  return make("pre", body, copy);
}

function list(rows, depth) {
  const ordered = /\d/.test(ITEM.exec(rows[0])[2]);
  const node = make(ordered ? "ol" : "ul");
  if (ordered) node.start = parseInt(ITEM.exec(rows[0])[2], 10);
  const indent = ITEM.exec(rows[0])[1].length;
  let item = null;
  for (const row of rows) {
    const match = ITEM.exec(row);
    if (match && match[1].length <= indent) {
      item = [match[3]];
      node.append(make("li"));
      node.lastChild.rows = item;
    } else {
      item.push(row.slice(Math.min(indent + 2, row.length - row.trimStart().length)));
    }
  }
  for (const child of node.children) {
    const [first, ...rest] = child.rows;
    delete child.rows;
    const blockStart = rest.findIndex((row) => ITEM.test(row) || FENCE.test(row) || !row.trim());
    const own = blockStart < 0 ? rest : rest.slice(0, blockStart);
    child.append(...lines([first, ...own.map((row) => row.trim())]), ...(blockStart < 0 ? [] : blocks(rest.slice(blockStart), depth + 1)));
  }
  return node;
}

const DEEPEST = 16; // levels of quotes and lists inside each other; deeper ones are shown as plain text

function blocks(rows, depth = 0) {
  if (depth > DEEPEST) return [make("p", rows.join("\n"))];
  const nodes = [];
  let at = 0;
  const take = (belongs) => {
    const from = at;
    while (at < rows.length && belongs(rows[at], at)) at++;
    return rows.slice(from, at);
  };
  while (at < rows.length) {
    const row = rows[at];
    const fence = FENCE.exec(row);
    const heading = /^\s{0,3}(#{1,6})\s+(.*?)\s*#*\s*$/.exec(row);
    if (!row.trim()) {
      at++;
    } else if (fence) {
      at++;
      const close = new RegExp(`^\\s*${fence[1][0]}{${fence[1].length},}\\s*$`);
      const inside = take((line) => !close.test(line)); // up to the end of the text where no fence closes it: it is still being written
      at++;
      nodes.push(code(inside.join("\n"), fence[2]));
    } else if (heading) {
      at++;
      nodes.push(make(`h${Math.min(heading[1].length + 2, 5)}`, ...inline(heading[2])));
    } else if (RULE.test(row)) {
      at++;
      nodes.push(make("hr"));
    } else if (/^\s*>/.test(row)) {
      nodes.push(make("blockquote", ...blocks(take((line) => /^\s*>/.test(line)).map((line) => line.replace(/^\s*> ?/, "")), depth + 1)));
    } else if (ITEM.test(row)) {
      nodes.push(list(take((line, i) => ITEM.test(line) || (/^\s+\S/.test(line)) || (!line.trim() && /^(\s+\S|\s*([-*+]|\d+[.)])\s)/.test(rows[i + 1] ?? ""))), depth));
    } else if (row.includes("|") && TABLE.test(rows[at + 1] ?? "") && (rows[at + 1] ?? "").includes("-")) {
      const head = cells(row);
      at += 2;
      const body = take((line) => line.includes("|") && line.trim());
      const line = (tag, values) => make("tr", ...head.map((_, i) => make(tag, ...inline(values[i] ?? ""))));
      const table = make("table", make("thead", line("th", head)), make("tbody", ...body.map((one) => line("td", cells(one)))));
      nodes.push(make("div", table));
      nodes.at(-1).className = "scroll";
    } else {
      const start = at; // the first line is always taken, so that the loop ends
      const begins = (line) => FENCE.test(line) || /^\s{0,3}#{1,6}\s/.test(line) || /^\s*>/.test(line) || ITEM.test(line);
      const text = take((line, i) => i === start || (line.trim() && !begins(line)));
      nodes.push(make("p", ...lines(text)));
    }
  }
  return nodes;
}

/** Returns DOM nodes that show `text`. */
export function render(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"));
}
