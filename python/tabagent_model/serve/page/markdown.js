// Markdown as elements. Nothing is ever parsed as HTML: all text goes in as text nodes, and a link
// may lead to http, https or mailto only.
//
// An answer grows at its end, so only its last block is made anew; the blocks before it stay.

export class Growing {
  #home;
  #done = 0; // characters whose blocks will not change any more
  #last = [];

  constructor(home) {
    this.#home = home;
  }

  show(text) {
    const blocks = blocksOf(text.slice(this.#done));
    for (const node of this.#last) node.remove();
    this.#last = [];
    blocks.forEach((block, index) => {
      const node = elementOrText(block);
      this.#home.append(node);
      if (index === blocks.length - 1) this.#last = [node];
      else this.#done += block.size;
    });
  }
}

// Lines to blocks. Each block knows how many characters of the text are its own.
function blocksOf(text) {
  const lines = text.split(/(?<=\n)/);
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    const begin = at;
    const block = nextBlock(lines, begin);
    at = block.end;
    while (at < lines.length && !lines[at].trim()) at += 1;
    block.size = lines.slice(begin, at).reduce((sum, line) => sum + line.length, 0);
    blocks.push(block);
  }
  return blocks;
}

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

function nextBlock(lines, begin) {
  const line = bare(lines[begin]);
  let end = begin + 1;
  let match;
  if ((match = FENCE.exec(line))) {
    const body = [];
    const closing = new RegExp(`^ {0,3}${match[1][0]}{${match[1].length},}\\s*$`);
    while (end < lines.length && !closing.test(bare(lines[end]))) body.push(lines[end++]);
    return { kind: "code", language: match[2], text: body.join(""), end: Math.min(end + 1, lines.length) };
  }
  if ((match = HEADING.exec(line))) return { kind: "heading", level: match[1].length, text: match[2], end };
  if (RULE.test(line)) return { kind: "rule", end };
  if (QUOTE.test(line)) {
    while (end < lines.length && QUOTE.test(bare(lines[end]))) end += 1;
    const text = lines.slice(begin, end).map((one) => QUOTE.exec(bare(one))[1]).join("\n");
    return { kind: "quote", text, end };
  }
  if (ITEM.test(line)) {
    const isNumbered = /^\s*\d/.test(line);
    const isOther = (next) => !/^\s{2,}/.test(next) && ITEM.test(next) && /^\s*\d/.test(next) !== isNumbered;
    while (end < lines.length && belongsToList(lines, end) && !isOther(bare(lines[end]))) end += 1;
    return { kind: "list", lines: lines.slice(begin, end).map(bare), end };
  }
  if (line.includes("|") && end < lines.length && lines[end].includes("-") && DIVIDER.test(bare(lines[end]))) {
    end += 1;
    while (end < lines.length && lines[end].includes("|")) end += 1;
    return { kind: "table", rows: lines.slice(begin, end).filter((_, i) => i !== 1).map(cellsOf), end };
  }
  while (end < lines.length && lines[end].trim() && !beginsBlock(bare(lines[end]))) end += 1;
  return { kind: "paragraph", text: lines.slice(begin, end).join("").trim(), end };
}

const bare = (line) => line.replace(/\r?\n$/, "");
const beginsBlock = (line) => [FENCE, HEADING, QUOTE, ITEM].some((kind) => kind.test(line));

function belongsToList(lines, at) {
  const line = bare(lines[at]);
  if (line.trim()) return ITEM.test(line) || /^\s{2,}/.test(line) || !beginsBlock(line) && lines[at - 1].trim() !== "";
  const next = lines.slice(at + 1).find((one) => one.trim());
  return next !== undefined && (ITEM.test(bare(next)) || /^\s{2,}/.test(next));
}

function cellsOf(line) {
  return bare(line).trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function elementOf(block) {
  switch (block.kind) {
    case "code": return codeElement(block);
    case "heading": return withText(`h${block.level}`, block.text);
    case "rule": return document.createElement("hr");
    case "quote": return withBlocks("blockquote", block.text);
    case "list": return listElement(block.lines);
    case "table": return tableElement(block.rows);
    default: return withText("p", block.text);
  }
}

// What is nested deeper than a program can go is shown as it is written.
function elementOrText(block) {
  try {
    return elementOf(block);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    const node = document.createElement("p");
    node.textContent = block.text ?? "…";
    return node;
  }
}

function withText(tag, text) {
  const node = document.createElement(tag);
  node.append(...inline(text));
  return node;
}

function withBlocks(tag, text) {
  const node = document.createElement(tag);
  node.append(...blocksOf(text).map(elementOf));
  return node;
}

function codeElement({ language, text }) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const copy = document.createElement("button");
  copy.type = "button";
  copy.textContent = "Copy";
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
  });
  const name = document.createElement("span");
  name.textContent = language;
  caption.append(name, copy);
  const pre = document.createElement("pre");
  const code = document.createElement("code");
  code.textContent = text;
  pre.tabIndex = 0; // so that the keyboard can scroll it
  pre.append(code);
  figure.append(caption, pre);
  return figure;
}

function listElement(lines) {
  const first = ITEM.exec(lines[0]);
  const list = document.createElement(/\d/.test(first[2]) ? "ol" : "ul");
  if (list.tagName === "OL") list.start = parseInt(first[2], 10);
  let item = null;
  const close = () => {
    if (item === null) return;
    const node = document.createElement("li");
    const blocks = blocksOf(item.join("\n"));
    // A single paragraph stands in its item without being one.
    if (blocks.length && blocks[0].kind === "paragraph") node.append(...inline(blocks.shift().text));
    node.append(...blocks.map(elementOf));
    list.append(node);
  };
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length <= first[1].length + 1) {
      close();
      item = [match[3]];
    } else {
      item.push(line.replace(/^ {1,4}|^\t/, ""));
    }
  }
  close();
  return list;
}

function tableElement(rows) {
  const table = document.createElement("table");
  rows.forEach((cells, index) => {
    const row = document.createElement("tr");
    row.append(...cells.map((cell) => withText(index ? "td" : "th", cell)));
    table.append(row);
  });
  const wide = document.createElement("div");
  wide.className = "wide";
  wide.append(table);
  return wide;
}

const SPANS = [
  [/(`+)(.+?)\1(?!`)/s, (m) => {
    const code = document.createElement("code");
    code.textContent = m[2].trim() || m[2];
    return code;
  }],
  [/\\([\\`*_{}[\]()#+\-.!|~<>])/, (m) => document.createTextNode(m[1])],
  [/!?\[([^\]]*)\]\(\s*<?([^\s()<>]+(?:\([^\s()]*\)[^\s()<>]*)?)>?(?:\s+"[^"]*")?\s*\)/, (m) => link(m[2], m[1] || m[2])],
  [/<(https?:\/\/[^\s<>]+)>/, (m) => link(m[1], m[1])],
  [/\bhttps?:\/\/[^\s<>"')\]]*[^\s<>"')\].,;:!?]/, (m) => link(m[0], null)],
  [/\*\*(?=\S)(.+?)(?<=\S)\*\*/s, (m) => withText("strong", m[1])],
  [/(?<!\w)__(?=\S)(.+?)(?<=\S)__(?!\w)/s, (m) => withText("strong", m[1])],
  [/~~(?=\S)(.+?)(?<=\S)~~/s, (m) => withText("del", m[1])],
  [/\*(?=[^\s*])(.+?)(?<=[^\s*])\*(?!\*)/s, (m) => withText("em", m[1])],
  [/(?<!\w)_(?=[^\s_])(.+?)(?<=[^\s_])_(?!\w)/s, (m) => withText("em", m[1])],
  [/ {2,}\n|\\\n/, () => document.createElement("br")],
];

// The earliest span, then what follows it; of two that begin together the one that is listed first.
function inline(text) {
  const nodes = [];
  while (text) {
    let best = null;
    let make = null;
    for (const [pattern, maker] of SPANS) {
      const match = pattern.exec(text);
      if (match && (best === null || match.index < best.index)) [best, make] = [match, maker];
    }
    if (best === null) break;
    if (best.index) nodes.push(document.createTextNode(text.slice(0, best.index)));
    nodes.push(make(best));
    text = text.slice(best.index + best[0].length);
  }
  if (text) nodes.push(document.createTextNode(text));
  return nodes;
}

function link(address, text) {
  let url = null;
  try {
    url = new URL(address);
  } catch {
    // no address of its own: it stays text
  }
  if (url === null || !["http:", "https:", "mailto:"].includes(url.protocol)) {
    return document.createTextNode(text ?? address);
  }
  const node = document.createElement("a");
  node.href = url.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  if (text === null || text === address) node.textContent = address;
  else node.append(...inline(text));
  return node;
}
