// Turns Markdown into DOM nodes. Text only ever becomes text nodes, so nothing that a model writes can become markup or script.

const make = (tag, ...children) => {
  const node = document.createElement(tag);
  node.append(...children);
  return node;
};

// The first match of any of these in a text becomes a node; the text before it stays text, and the text after it is searched in turn.
// None looks further than 1,000 characters, so that a text full of beginnings that nothing ends is drawn in time, too.
const INLINE = [
  [/(?<!`)(`{1,16})(?!`)([^`]|[^`][\s\S]{0,1000}?[^`])\1(?!`)/, (m) => make("code", m[2].replace(/^ (.*) $/, "$1"))],
  [/\\([\\`*_{}[\]()#+\-.!|~>])/, (m) => m[1]],
  [/\[([^\[\]\n]{1,1000})\]\(\s?<?([^\s)>]{1,2000})>?(?:\s"[^"\n]{0,500}")?\s?\)/, (m) => link(m[2], inline(m[1]), m[0])],
  [/\bhttps?:\/\/[^\s<>()"']*[^\s<>()"'.,;:!?]/, (m) => link(m[0], [m[0]], m[0])],
  [/\*\*(?=\S)([\s\S]{0,1000}?\S)\*\*/, (m) => make("strong", ...inline(m[1]))],
  [/(?<!\w)__(?=\S)([\s\S]{0,1000}?\S)__(?!\w)/, (m) => make("strong", ...inline(m[1]))],
  [/\*(?=[^\s*])([^*]{0,1000}?[^\s*])\*/, (m) => make("em", ...inline(m[1]))],
  [/(?<!\w)_(?=[^\s_])([^_]{0,1000}?[^\s_])_(?!\w)/, (m) => make("em", ...inline(m[1]))],
  [/~~(?=\S)([\s\S]{0,1000}?\S)~~/, (m) => make("s", ...inline(m[1]))],
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
  let at = 0;
  const next = INLINE.map(() => undefined); // each pattern's next match, which is searched for again only once it lies behind
  for (;;) {
    let first = -1;
    INLINE.forEach(([pattern], i) => {
      if (next[i] !== null && (next[i] === undefined || next[i].index < at)) {
        const search = new RegExp(pattern, "g");
        search.lastIndex = at;
        next[i] = search.exec(text);
      }
      if (next[i] && (first < 0 || next[i].index < next[first].index)) first = i;
    });
    if (first < 0) break;
    nodes.push(text.slice(at, next[first].index), INLINE[first][1](next[first]));
    at = next[first].index + next[first][0].length;
  }
  nodes.push(text.slice(at));
  return nodes.filter((node) => node !== "");
}

// A heading's text without the #s that may close it. By hand: patterns that try every split of a row of spaces take minutes for long ones.
function unclosed(text) {
  const shown = text.trimEnd();
  let end = shown.length;
  while (end && shown[end - 1] === "#") end--;
  return shown.slice(0, end).trimEnd();
}

const lines = (list) => list.flatMap((text, i) => (i ? [document.createElement("br"), ...inline(text)] : inline(text)));
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const FENCE = /^\s*(```+|~~~+)(?![`~])\s*([\w+#.-]*)(?![\w+#.-])[^`]*$/;
const isRule = (row) => /^([-*_])\1{2,}$/.test(row.replace(/\s/g, ""));
const isTable = (row) => /^\|?:?-+:?(\|:?-+:?)*\|?$/.test(row.replace(/\s/g, ""));
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
    const heading = /^\s{0,3}(#{1,6})\s+(.*)$/.exec(row);
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
      nodes.push(make(`h${Math.min(heading[1].length + 2, 5)}`, ...inline(unclosed(heading[2]))));
    } else if (isRule(row)) {
      at++;
      nodes.push(make("hr"));
    } else if (/^\s*>/.test(row)) {
      nodes.push(make("blockquote", ...blocks(take((line) => /^\s*>/.test(line)).map((line) => line.replace(/^\s*> ?/, "")), depth + 1)));
    } else if (ITEM.test(row)) {
      nodes.push(list(take((line, i) => ITEM.test(line) || (/^\s+\S/.test(line)) || (!line.trim() && /^(\s+\S|\s*([-*+]|\d+[.)])\s)/.test(rows[i + 1] ?? ""))), depth));
    } else if (row.includes("|") && isTable(rows[at + 1] ?? "")) {
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
