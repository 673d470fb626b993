/* What the interactive pages share: elements, a state in the address, polite words.
 *
 * A page's own script is loaded after this one and extends Widget.
 */
"use strict";

(() => {
  /** An element: `class`, `text`, `on…` and attributes; children as they come. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "text") element.textContent = value;
      else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  /** Set a text only where it differs, so that nothing is read out twice. */
  function write(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  /** What is wrong with an address, in one message; empty if nothing is. */
  function aboutAddress(wrong) {
    if (!wrong.length) return "";
    return `This link asks for something else than there is: ${wrong.join("; ")}. The usual stands in its place.`;
  }

  /** An interactive part of a page, whose `state` is in the address.
   *
   * A subclass makes its parts, calls `start`, and has
   *   render(typed)        show the state; set `known` to null if it cannot be read
   *   toFragment()         the state as a fragment
   *   fromAddress(address) the state that an address asks for, and a message
   */
  class Widget {
    constructor(root, name) {
      this.root = root;
      this.name = name;
      this.data = JSON.parse(root.querySelector("script").textContent);
      this.problem = make("p", { id: `${name}-problem`, class: this.part("problem"), hidden: "" });
      this.status = make("p", { class: this.part("status"), role: "status" });
      this.python = make("code");
      this.share = make("button", {
        type: "button",
        class: this.part("share"),
        text: "Copy a link to this",
        onclick: () => this.copyLink(),
      });
    }

    /** The classes of a part: one for what all widgets share, and its own. */
    part(name) {
      return `hb-widget__${name} hb-${this.name}__${name}`;
    }

    start() {
      addEventListener("hashchange", () => this.restore(location.hash));
      this.address = location.hash;
      const asked = location.hash.includes("=") ? location.hash : location.search;
      if (asked.includes("=")) this.restore(asked);
      else this.render();
    }

    change(change, { typed = false } = {}) {
      this.state = { ...this.state, ...change };
      this.render(typed);
      clearTimeout(this.later);
      this.later = setTimeout(() => this.save(), typed ? 250 : 0);
    }

    save() {
      clearTimeout(this.later);
      // An address that is new is the reader's wish: its event is on the way.
      if (!this.known || location.hash !== this.address) return;
      const fragment = this.toFragment();
      if (location.hash === fragment) return;
      try {
        history.replaceState(history.state, "", fragment);
      } catch {
        location.hash = fragment; // a browser that keeps files from doing that
      }
      this.address = location.hash;
    }

    /** Take the state of an address; a fragment without "=" is a place on the page. */
    restore(address) {
      clearTimeout(this.later);
      this.address = location.hash;
      if (!address.includes("=")) return;
      const found = this.fromAddress(address);
      this.state = found.state;
      this.render();
      this.complain(found.message);
    }

    async copyLink() {
      this.save();
      let said = "Copied.";
      try {
        await navigator.clipboard.writeText(location.href);
      } catch {
        said = "The browser does not let pages copy: take it from the address bar.";
      }
      write(this.share, said);
      write(this.status, said);
      setTimeout(() => write(this.share, "Copy a link to this"), 4000);
    }

    complain(message) {
      clearTimeout(this.complaint);
      this.problem.hidden = !message;
      write(this.problem, message);
      if (message) {
        clearTimeout(this.announcement);
        write(this.status, message);
      }
    }

    /** The input cannot be read; half a number is no mistake yet. */
    reject(message, typed) {
      this.known = null;
      this.input.setAttribute("aria-invalid", "true");
      this.root.classList.add("hb-widget--stale");
      clearTimeout(this.complaint);
      this.complaint = setTimeout(() => this.complain(message), typed ? 600 : 0);
    }

    accept(known) {
      this.known = known;
      this.input.removeAttribute("aria-invalid");
      this.root.classList.remove("hb-widget--stale");
      this.complain("");
    }

    /** Tell those who do not see it, when the reader rests. */
    announce(text, typed) {
      clearTimeout(this.announcement);
      if (!this.wasShown) {
        this.wasShown = true; // what the page opens with is read with the page
        return;
      }
      this.announcement = setTimeout(() => write(this.status, text), typed ? 700 : 150);
    }
  }

  globalThis.halfTheBitsWidget = { make, write, aboutAddress, Widget };
})();
