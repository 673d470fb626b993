/* The precision chooser: a device, a framework, a task and a size, and what to set.
 *
 * No build step, no request: it works from a disk, beside widget.js. Reading order:
 *
 *   1 answers   2 the address   3 the page
 *
 * It knows no rule: _ext/choose.py writes into the page what recommend_precision of
 * snippets/choose_a_precision.py answers to every question, with the bytes of one
 * parameter. Here they are looked up, and multiplied by the parameters as Python does;
 * tests/test_choose.py compares the two for every question.
 */
"use strict";

(() => {
  const { make, write, aboutAddress, Widget } = globalThis.halfTheBitsWidget;

  // ------------------------------------------------------------------- 1 answers

  /** Bytes in the largest unit below them, with one decimal, ties up; as in Python. */
  function written(total) {
    const units = [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10], ["B", 1]];
    const [unit, size] = units.find(([, least]) => total >= least) ?? ["B", 1];
    return `${(Math.floor((total / size) * 10 + 0.5) / 10).toFixed(1)} ${unit}`;
  }

  /** A number of parameters as people write it, 7e9, 7B or 125 M; or null. */
  function readParameters(text) {
    const found = /^(\d+\.?\d*|\.\d+)(e\+?\d+)?\s*([kmbgt]?)$/i.exec(
      text.trim().replace(/(\d)[,_](?=\d{3}(?!\d))/g, "$1"),
    );
    if (!found) return null;
    const power = { "": 0, k: 3, m: 6, b: 9, g: 9, t: 12 }[found[3].toLowerCase()];
    const exponent = Number((found[2] ?? "e0").slice(1)) + power;
    const number = Number(`${found[1]}e${exponent}`); // rounded once: 2.7B is 2.7e9
    return number >= 1 && number <= 1e15 ? number : null;
  }

  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  const scale = (bytes, parameters) => bytes.map((size) => Math.trunc(size * parameters));

  /** What recommend_precision answers; `nearest` stands in a refusal alone. */
  function answer(data, { hardware, framework, task, parameters }) {
    const [tasks, frameworks] = [Object.keys(data.tasks), data.frameworks];
    const device = Object.keys(data.hardware).indexOf(hardware);
    const row = device * frameworks.length + frameworks.indexOf(framework);
    const found = data.answers[data.table[row * tasks.length + tasks.indexOf(task)]];
    const note = (number) => data.notes[number];
    if (found.length === 3) {
      const [why, nearHardware, nearFramework] = found;
      const nearest = { hardware: nearHardware, framework: nearFramework, task, parameters };
      return { why: note(why), nearest };
    }
    const [name, setting, why, each, warnings, others] = found;
    const memory = scale(each, parameters);
    const total = sum(memory);
    const told = warnings.map(note);
    const [label, , gigabytes] = data.hardware[hardware];
    const devices = gigabytes ? Math.ceil(total / (gigabytes * 1e9)) : 1;
    if (devices > 1) {
      const values = { total: written(total), memory: gigabytes, device: label, devices };
      const [text, page] = data.shard;
      told.push([text.replace(/\{(\w+)\}/g, (_, key) => values[key]), page]);
    }
    const alternatives = others.map(([otherName, otherSetting, otherWhy, bytes]) => ({
      name: otherName,
      setting: otherSetting,
      why: note(otherWhy),
      total: sum(scale(bytes, parameters)),
    }));
    return { name, setting, why: note(why), memory, total, warnings: told, alternatives };
  }

  // ------------------------------------------------------------------- 2 the address

  const KEYS = ["hardware", "framework", "task", "parameters"];

  /** The state as a fragment, in the words of Python's arguments. */
  function toFragment(state) {
    return `#${KEYS.map((key) => `${key}=${encodeURIComponent(state[key])}`).join("&")}`;
  }

  /** The state that a fragment or a query asks for, and what is wrong with it. */
  function fromAddress(address, data) {
    const state = { ...data.usual };
    const wrong = [];
    const allowed = {
      hardware: Object.keys(data.hardware),
      framework: data.frameworks,
      task: Object.keys(data.tasks),
    };
    for (const [key, value] of new URLSearchParams(address.slice(1).replace(/\+/g, "%2B"))) {
      if (allowed[key] && !allowed[key].includes(value)) {
        wrong.push(`${key} “${value}” (there are ${allowed[key].join(", ")})`);
      } else if (key === "parameters" && readParameters(value) === null) {
        wrong.push(`parameters “${value}” (a number from 1 to 1e15)`);
      } else if (KEYS.includes(key)) {
        state[key] = value;
      } else if (address.startsWith("#")) {
        wrong.push(`“${key}” (there are ${KEYS.join(", ")})`);
      }
    }
    return { state, message: aboutAddress(wrong) };
  }

  globalThis.halfTheBitsChooser = {
    answer, written, readParameters, toFragment, fromAddress,
  };

  // ------------------------------------------------------------------- 3 the page

  const within = "hb-choose__"; // every class of the chooser's begins so

  class Chooser extends Widget {
    constructor(root) {
      super(root, "choose");
      this.state = { ...this.data.usual };
      this.build();
      this.start();
    }

    toFragment() {
      return toFragment(this.state);
    }

    fromAddress(address) {
      return fromAddress(address, this.data);
    }

    build() {
      const { data } = this;
      const device = ([label, capability]) =>
        capability ? `${label} (${capability})` : label;
      this.selects = {
        hardware: this.select("hardware", "Device (compute capability)", Object.entries(data.hardware).map(
          ([key, about]) => [key, device(about)],
        )),
        framework: this.select("framework", "Framework", data.frameworks.map(
          (key) => [key, key],
        )),
        task: this.select("task", "Task", Object.entries(data.tasks).map(
          ([key, meaning]) => [key, `${key}: ${meaning}`],
        )),
      };
      this.input = make("input", {
        class: this.part("input"),
        id: "choose-parameters",
        type: "text",
        inputmode: "text",
        autocomplete: "off",
        spellcheck: "false",
        "aria-describedby": "choose-problem",
        oninput: () => this.change({ parameters: this.input.value }, { typed: true }),
      });
      this.out = make("div", { class: `${within}out`, role: "group", "aria-label": "Recommendation" });
      this.root.append(
        make(
          "div",
          { class: this.part("panel") },
          make(
            "div",
            { class: `${within}top` },
            ...Object.values(this.selects).map((select) => select.parentElement),
            this.field(this.input, "Parameters, such as 7e9 or 125M"),
          ),
          this.problem,
          this.out,
          make(
            "div",
            { class: this.part("foot") },
            make("p", { class: `${within}python` }, make("span", { text: "In Python " }), this.python),
            this.share,
          ),
        ),
        this.status,
      );
    }

    field(control, title) {
      const label = make("label", { for: control.id, class: this.part("label"), text: title });
      return make("div", { class: `${within}field` }, label, control);
    }

    select(key, title, options) {
      const select = make(
        "select",
        { class: this.part("select"), id: `choose-${key}`, onchange: () => this.change({ [key]: select.value }) },
        ...options.map(([value, text]) => make("option", { value, text })),
      );
      this.field(select, title);
      return select;
    }

    render(typed = false) {
      const { state } = this;
      for (const [key, select] of Object.entries(this.selects)) select.value = state[key];
      if (!typed && this.input.value !== state.parameters) this.input.value = state.parameters;
      const parameters = readParameters(state.parameters);
      if (parameters === null) {
        this.reject(`“${state.parameters}” is no number of parameters from 1 to 1e15. Type 7e9, 7B or 125M.`, typed);
        return;
      }
      this.accept(parameters);
      const found = answer(this.data, { ...state, parameters });
      this.out.replaceChildren(...(found.nearest ? this.refusal(found) : this.answer(found)));
      const words = [state.hardware, state.framework].map((word) => `"${word}"`);
      const short = parameters % 1e6 === 0 ? parameters.toExponential() : String(parameters);
      const number = short.replace("e+", "e");
      write(this.python, `recommend_precision(${words.join(", ")}, ${number}, "${state.task}")`);
      this.announce(this.inWords(found), typed);
    }

    /** A note, and a link to the page that explains it. */
    note([text, page]) {
      const sentence = `${text[0].toUpperCase()}${text.slice(1)}.`;
      const known = this.data.pages[page];
      if (!known) return [sentence];
      return [`${sentence} `, make("a", { href: known[0], text: known[1] })];
    }

    refusal({ why, nearest }) {
      const near = answer(this.data, nearest);
      const link = make("a", {
        href: toFragment({ ...nearest, parameters: this.state.parameters }),
        text: `${nearest.framework} on ${this.data.hardware[nearest.hardware][0]}`,
      });
      return [
        make("p", { class: `${within}no`, text: "No recommendation" }),
        make("p", { class: `${within}why` }, ...this.note(why)),
        make("p", { class: `${within}near` }, "Nearest: ", link, ", ", make("code", { text: near.setting }), "."),
      ];
    }

    answer({ setting, why, memory, total, warnings, alternatives }) {
      const { kinds } = this.data;
      const parts = kinds.map((kind, i) => [kind, memory[i]]).filter(([, bytes]) => bytes);
      const bar = make("div", { class: `${within}bar`, "aria-hidden": "true" });
      const list = make("dl", { class: `${within}memory` });
      for (const [kind, bytes] of parts) {
        const name = kind.replace(" ", "-");
        const piece = make("span", { class: `${within}kind ${within}${name}` });
        piece.style.flexGrow = String(bytes / total);
        bar.append(piece);
        list.append(
          make("div", { class: `${within}kind ${within}${name}` },
            make("dt", { text: kind }), " ", make("dd", { text: written(bytes) })),
        );
      }
      const parting = [
        make("h3", { class: `${within}title`, text: "Set" }),
        make("p", { class: `${within}setting` }, make("code", { text: setting })),
        make("p", { class: `${within}why` }, ...this.note(why)),
        make("h3", { class: `${within}title` }, "Holds ", make("b", { class: `${within}total`, text: written(total) }), ", and activations"),
        bar,
        list,
      ];
      if (warnings.length) {
        parting.push(
          make("h3", { class: `${within}title`, text: "Look out for" }),
          make("ul", { class: `${within}warnings` }, ...warnings.map((note) => make("li", {}, ...this.note(note)))),
        );
      }
      if (alternatives.length) {
        parting.push(
          make("h3", { class: `${within}title`, text: "Or" }),
          make("ul", { class: `${within}others` }, ...alternatives.map((other) =>
            make("li", {},
              make("code", { text: other.setting }),
              " ",
              make("b", { text: written(other.total) }),
              make("br"),
              ...this.note(other.why)))),
        );
      }
      return parting;
    }

    inWords(found) {
      return found.nearest
        ? `No recommendation: ${found.why[0]}`
        : `Set ${found.setting}. It holds ${written(found.total)}, with ${found.warnings.length} warnings and ${found.alternatives.length} alternatives.`;
    }
  }

  if (typeof document !== "undefined") {
    const root = document.querySelector("div.hb-choose");
    if (root) new Chooser(root);
  }
})();
