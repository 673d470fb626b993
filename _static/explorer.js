/* The number format explorer: a number, or a bit pattern, in every format.
 *
 * No build step, no request: it works from a disk, beside widget.js. Reading order:
 *
 *   1 formats and arithmetic   2 reading what is typed   3 writing numbers
 *   4 what is to be shown      5 the address             6 the page
 *
 * A number is the 64 bits of a float64, as a BigInt, so that -0 and NaN are as any other
 * and nothing is rounded twice. Sections 1 to 3 touch no page; tests/test_explorer.py
 * holds them against snippets/number_formats.py, which says why the arithmetic is as it
 * is. The formats come from there as well: _ext/explorer.py writes them into the page.
 */
"use strict";

(() => {
  const { make, write, aboutAddress, Widget } = globalThis.halfTheBitsWidget;

  // ------------------------------------------------------- 1 formats and arithmetic

  const MANTISSA = 52n; // of float64, as is BIAS
  const BIAS = 1023n;
  const SIGN = 1n << 63n;
  const INF = 0x7ffn << MANTISSA;
  const NAN = INF | (1n << 51n);
  const LEADING = 1n << MANTISSA;

  const ROUNDINGS = {
    nearest: "nearest, ties to even",
    toward_zero: "toward zero",
    up: "up, to +Inf",
    down: "down, to −Inf",
  };
  const OVERFLOWS = {
    saturate: "saturate: the largest",
    ieee: "ieee: Inf, or NaN",
  };

  const view = new DataView(new ArrayBuffer(8));

  /** The 64 bits of a number. */
  function toBits(number) {
    view.setFloat64(0, number);
    return view.getBigUint64(0);
  }

  /** The number of 64 bits. */
  function toNumber(bits) {
    view.setBigUint64(0, bits);
    return view.getFloat64(0);
  }

  const absolute = (bits) => bits & (SIGN - 1n);
  const isNegative = (bits) => bits >= SIGN;
  const isNaNBits = (bits) => absolute(bits) > INF;
  const larger = (a, b) => (a > b ? a : b);
  const smaller = (a, b) => (a < b ? a : b);
  const bitLength = (n) => BigInt(n.toString(2).length); // of n > 0

  /** Complete a format's integers by what follows from them; names as in Python. */
  function makeFormat(data) {
    const p = BigInt(data.mantissa_bits);
    const magnitude = BigInt(data.exponent_bits) + p;
    const bits = Number(magnitude) + (data.has_sign ? 1 : 0);
    const specials = { ieee: 1n << p, all_ones: 1n }[data.nan_encoding] ?? 0n;
    const maxCode = (1n << magnitude) - 1n - specials;
    const quiet = data.has_inf ? (1n << p) >> 1n : 0n;
    const isUnsignedZero = data.nan_encoding === "negative_zero";
    const firstRank = data.has_zero ? 0n : 1n << p;
    return Object.freeze({
      name: data.name,
      exponentBits: data.exponent_bits,
      mantissaBits: data.mantissa_bits,
      bias: data.bias,
      hasInf: data.has_inf,
      hasNaN: data.nan_encoding !== null,
      hasSign: data.has_sign,
      hasZero: data.has_zero,
      isUnsignedZero,
      p,
      bits,
      magnitude,
      maxCode,
      nanCode: isUnsignedZero ? 1n << BigInt(bits - 1) : (maxCode + 1n) | quiet,
      firstRank,
      lastRank: maxCode + firstRank,
      minExponent: (data.has_zero ? 1n : 0n) - BigInt(data.bias),
    });
  }

  /** The rank of the value at or below |x|, and what is left of `drop` dropped bits. */
  function place(x, format) {
    const field = absolute(x) >> MANTISSA;
    const exponent = larger(field, 1n) - BIAS;
    const significand = (x & (LEADING - 1n)) + (field > 0n ? LEADING : 0n);
    const below = format.minExponent - exponent;
    const drop = MANTISSA - format.p + larger(below, 0n);
    const kept = significand >> drop;
    return {
      rank: kept + (larger(-below, 0n) << format.p),
      rest: significand - (kept << drop),
      drop,
    };
  }

  /** The float64 of a rank: the inverse of `place`. */
  function valueOf(rank, format) {
    const exponent = rank >> format.p;
    const mantissa = rank & ((1n << format.p) - 1n);
    if (exponent > 0n) {
      const biased = exponent - 1n + format.minExponent + BIAS;
      return (biased << MANTISSA) + (mantissa << (MANTISSA - format.p));
    }
    return scaled(mantissa, format.minExponent - format.p);
  }

  /** The float64 of m * 2**k, where it has one. */
  function scaled(m, k) {
    if (m === 0n) return 0n;
    const exponent = larger(bitLength(m) - 1n + k, 1n - BIAS);
    return ((exponent + BIAS - 1n) << MANTISSA) + (m << (MANTISSA - exponent + k));
  }

  function check(name, value, allowed) {
    if (!Object.hasOwn(allowed, value)) {
      const known = Object.keys(allowed).join(", ");
      throw new RangeError(`${name} must be one of ${known}, got ${value}`);
    }
  }

  /** Whether rounding leads away from zero, given what `place` found. */
  function goesAway({ rank, rest, drop }, negative, format, rounding) {
    if (rest === 0n || rounding === "toward_zero") return false;
    if (rounding !== "nearest") return (rounding === "up") !== negative;
    const half = 1n << (drop - 1n);
    // Without a mantissa, the leading 1 is all there is, and odd.
    const odd = format.p > 0n ? (rank & 1n) === 1n : rank > 0n;
    return rest > half || (rest === half && odd);
  }

  /** The code of a float64 in a format, as `encode` in Python; errors are RangeErrors. */
  function encode(x, format, rounding = "nearest", overflow = "saturate") {
    return encodeFully(x, format, rounding, overflow).code;
  }

  /** The code, and whether it is that of a number beyond the largest. */
  function encodeFully(x, format, rounding, overflow) {
    check("rounding", rounding, ROUNDINGS);
    check("overflow", overflow, OVERFLOWS);
    if (!format.hasNaN && overflow === "ieee") {
      throw new RangeError(`${format.name} has no Inf or NaN: use 'saturate'`);
    }
    let negative = isNegative(x);
    const isNaN = isNaNBits(x);
    let code = format.nanCode;
    let over = false;
    if (isNaN && !format.hasNaN) {
      throw new RangeError(`${format.name} has no NaN, but x has`);
    }
    if (!isNaN && (format.hasSign || !negative || x === SIGN)) {
      const found = place(x, format);
      const away = goesAway(found, negative, format, rounding);
      const rank = larger(found.rank + (away ? 1n : 0n), format.firstRank);
      const infinite = absolute(x) === INF;
      code = rank - format.firstRank;
      over = code > format.maxCode || infinite;
      if (over) {
        const stays = rounding === "toward_zero" || (rounding === "up") === negative;
        const cut = rounding !== "nearest" && stays && !infinite;
        const beyond = format.hasInf ? format.maxCode + 1n : format.nanCode;
        code = overflow === "ieee" && !cut ? beyond : format.maxCode;
      }
      if (format.isUnsignedZero && code === 0n) negative = false;
    }
    const sign = negative && format.hasSign ? 1n << format.magnitude : 0n;
    return { code: code | sign, over };
  }

  /** The float64 of a code; NaN, with its sign, for every NaN code. */
  function decode(code, format) {
    const magnitude = code & ((1n << format.magnitude) - 1n);
    let value = valueOf(magnitude + format.firstRank, format);
    if (magnitude > format.maxCode) value = NAN;
    if (format.hasInf && magnitude === format.maxCode + 1n) value = INF;
    if (format.isUnsignedZero && code === format.nanCode) value = NAN;
    return code === magnitude ? value : value | SIGN;
  }

  /** The largest value below x and the smallest above; NaN where there is none. */
  function neighbours(x, format) {
    const infinite = absolute(x) === INF ? 1n : 0n;
    const found = place(x, format);
    const last = format.lastRank;
    const inside = found.rest > 0n || found.rank > last;
    const between = inside && !infinite ? 1n : 0n;
    const rank = smaller(found.rank, last) + infinite;
    // Ranks below zero are those of the negative numbers.
    const floor = isNegative(x) ? -rank - between : rank;
    const top = last + (format.hasInf ? 1n : 0n);
    const lowest = format.hasSign ? -top : format.firstRank;
    const value = (r) => {
      if (isNaNBits(x) || r < lowest || r > top) return NAN;
      const size = r < 0n ? -r : r;
      return (size > last ? INF : valueOf(size, format)) | (r < 0n ? SIGN : 0n);
    };
    return [value(floor - 1n + between), value(larger(floor + 1n, lowest))];
  }

  /** The step from x away from zero; at most the last one. */
  function ulp(x, format) {
    if (isNaNBits(x)) return NAN;
    // Without a mantissa each step is larger than the last.
    const last = format.lastRank - (format.p > 0n ? 1n : 0n);
    const rank = larger(smaller(place(x, format).rank, last), format.firstRank);
    const step = toNumber(valueOf(rank + 1n, format)) - toNumber(valueOf(rank, format));
    return toBits(step);
  }

  /** The limits of a format, by torch's names, as float64. */
  function finfo(format) {
    return {
      max: valueOf(format.lastRank, format),
      smallest_normal: valueOf(1n << format.p, format),
      smallest_subnormal: valueOf(larger(format.firstRank, 1n), format),
    };
  }

  // ------------------------------------------------------- 2 reading what is typed

  const LONGEST = 200; // letters of a number
  const HIGHEST = 5000n; // exponents, so that no one waits for 10^999999999
  const WIDEST = 40000n; // bits of what is between
  const KINDS = "Type 0.3, 1e-8, 1/3, 2^-9, 0x1.8p-3, -0, inf or nan";

  /** The float64 nearest to n / d, ties to even; d > 0. */
  function nearestFloat64(n, d) {
    if (n === 0n) return 0n;
    const sign = n < 0n ? SIGN : 0n;
    const size = n < 0n ? -n : n;
    let exponent = bitLength(size) - bitLength(d);
    const fits =
      exponent < 0n ? size << -exponent >= d : size >= d << exponent;
    if (!fits) exponent -= 1n;
    exponent = larger(exponent, 1n - BIAS);
    const shift = MANTISSA - exponent;
    const top = shift > 0n ? size << shift : size;
    const bottom = shift > 0n ? d : d << -shift;
    let q = top / bottom;
    const rest = 2n * (top - q * bottom);
    if (rest > bottom || (rest === bottom && (q & 1n) === 1n)) q += 1n;
    const bits = q + ((exponent + BIAS - 1n) << MANTISSA);
    return sign | smaller(bits, INF);
  }

  /** A fraction, exactly; `minus` is the sign of a zero. */
  const fraction = (n, d, minus = false) => {
    const [top, bottom] = d < 0n ? [-n, -d] : [n, d];
    for (const part of [top, bottom]) {
      if (bitLength(part < 0n ? -part : part) > WIDEST) {
        throw new RangeError("That is too large to compute on the way.");
      }
    }
    return { n: top, d: bottom, minus };
  };

  function power(base, exponent) {
    if (exponent.n % exponent.d !== 0n) {
      throw new RangeError("An exponent must be a whole number.");
    }
    let times = exponent.n / exponent.d;
    if (times > HIGHEST || times < -HIGHEST) {
      throw new RangeError(`An exponent must be from −${HIGHEST} to ${HIGHEST}.`);
    }
    let { n, d } = base;
    if (times < 0n) {
      if (n === 0n) throw new RangeError("That divides by zero; write inf.");
      [n, d, times] = [d, n, -times];
    }
    for (const part of [n, d]) {
      if (bitLength(part < 0n ? -part : part) * times > WIDEST + HIGHEST) {
        throw new RangeError("That is too large to compute on the way.");
      }
    }
    return fraction(n ** times, d ** times);
  }

  /** Compute a formula of numbers, + - * / ^ ( ), exactly, with Python's precedence. */
  function compute(text) {
    const number = String.raw`(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?`;
    const tokens = text.match(new RegExp(`${number}|pi|\\*\\*|[-+*/^()]|\\S`, "g")) ?? [];
    let next = 0;
    const accept = (...wanted) => wanted.includes(tokens[next]) && tokens[next++];

    const sum = () => {
      let left = product();
      for (let op; (op = accept("+", "-")); ) {
        const right = product();
        const n = right.n * left.d;
        left = fraction(left.n * right.d + (op === "+" ? n : -n), left.d * right.d);
      }
      return left;
    };
    const product = () => {
      let left = signed();
      for (let op; (op = accept("*", "/")); ) {
        let { n, d } = signed();
        if (op === "/") {
          if (n === 0n) throw new RangeError("That divides by zero; write inf.");
          [n, d] = [d, n];
        }
        left = fraction(left.n * n, left.d * d);
      }
      return left;
    };
    const signed = () => {
      const op = accept("-", "+");
      if (!op) return raised();
      const { n, d, minus } = signed();
      return op === "-" ? fraction(-n, d, !minus) : fraction(n, d, minus);
    };
    const raised = () => {
      const base = atom();
      return accept("^", "**") ? power(base, signed()) : base;
    };
    const atom = () => {
      if (accept("(")) {
        const inside = sum();
        if (!accept(")")) throw new SyntaxError("A bracket is not closed.");
        return inside;
      }
      const token = tokens[next++] ?? "";
      if (token === "pi") return fraction(...ratioOf(toBits(Math.PI)));
      if (!/^[\d.]+(e|$)/.test(token) || !/\d/.test(token)) throw new SyntaxError();
      const [digits, exponent = "0"] = token.split("e");
      const [whole, decimals = ""] = digits.split(".");
      const e = { n: BigInt(exponent) - BigInt(decimals.length), d: 1n };
      const { n, d } = power({ n: 10n, d: 1n }, e);
      return fraction(BigInt(whole + decimals) * n, d);
    };

    const result = sum();
    if (next < tokens.length) throw new SyntaxError();
    return result;
  }

  /** Numerator and denominator of a finite float64. */
  function ratioOf(bits) {
    const [m, k] = oddPower(bits);
    return k < 0n ? [m, 1n << -k] : [m << k, 1n];
  }

  /** A finite float64 as [m, k] with value m * 2**k and m odd, or [0, 0]. */
  function oddPower(bits) {
    const field = absolute(bits) >> MANTISSA;
    let m = (bits & (LEADING - 1n)) + (field > 0n ? LEADING : 0n);
    let k = larger(field, 1n) - BIAS - MANTISSA;
    if (m === 0n) return [0n, 0n];
    while ((m & 1n) === 0n) [m, k] = [m >> 1n, k + 1n];
    return [isNegative(bits) ? -m : m, k];
  }

  /**
   * Read a number, or a code of the format: its float64, its code if it was one, and
   * whether the float64 is what was typed. What cannot be read is an Error in words.
   */
  function read(text, format) {
    const clean = text
      .trim()
      .toLowerCase()
      .replace(/[−–]/g, "-")
      .replace(/[×·]/g, "*")
      .replace(/∞/g, "inf");
    const hint = `${KINDS}, or a code of ${format.name}: 0x… or 0b….`;
    if (!clean) throw new Error(`There is no number. ${hint}`);
    if (clean.length > LONGEST) {
      throw new Error(`That has ${clean.length} letters; ${LONGEST} are the most.`);
    }

    const named = /^([+-]?)(inf|infinity|nan)$/.exec(clean);
    if (named) {
      const bits = named[2] === "nan" ? NAN : INF;
      return { bits: bits | (named[1] === "-" ? SIGN : 0n), code: null, exact: true };
    }
    if (/^0x[\da-f_ ]*[\da-f]$|^0b[01_ ]*[01]$/.test(clean)) {
      const code = BigInt(clean.replace(/[_ ]/g, ""));
      if (code >> BigInt(format.bits)) {
        const needed = bitLength(code);
        throw new Error(
          `That code needs ${needed} bits; ${format.name} has ${format.bits}. ${hint}`,
        );
      }
      return { bits: decode(code, format), code, exact: true };
    }
    const hexadecimal = /^([+-]?)0x([\da-f]+)\.?([\da-f]*)p([+-]?\d+)$/.exec(clean);
    let found;
    try {
      if (hexadecimal) {
        const [, sign, whole, decimals, exponent] = hexadecimal;
        const e = { n: BigInt(exponent) - 4n * BigInt(decimals.length), d: 1n };
        const { n, d } = power({ n: 2n, d: 1n }, e);
        const size = BigInt(`0x${whole}${decimals}`) * n;
        found = fraction(sign === "-" ? -size : size, d, sign === "-");
      } else {
        found = compute(clean);
      }
    } catch (error) {
      const why = error instanceof RangeError ? error.message : "";
      throw new Error(`${why || `“${text.trim()}” is not a number.`} ${hint}`);
    }
    let bits = nearestFloat64(found.n, found.d);
    if (found.n === 0n && found.minus) bits = SIGN;
    let exact = false;
    if (absolute(bits) !== INF) {
      const [n, d] = ratioOf(bits);
      exact = n * found.d === found.n * d && !clean.includes("pi");
    }
    return { bits, code: null, exact };
  }

  // ------------------------------------------------------- 3 writing numbers

  const MINUS = "−";
  const raise = (n) =>
    String(n).replace(/[-\d]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));

  /** The shortest decimal that is this float64, as Python and torch print it. */
  function shortest(bits) {
    if (isNaNBits(bits)) return isNegative(bits) ? "-nan" : "nan";
    if (absolute(bits) === INF) return isNegative(bits) ? "-inf" : "inf";
    if (bits === SIGN) return "-0";
    return String(toNumber(bits)).replace("e+", "e");
  }

  /** The same to be read: the sign of a NaN says nothing. */
  const shown = (bits) => (isNaNBits(bits) ? "nan" : shortest(bits));

  /** A finite float64 as odd integer and power of two: 5 · 2⁻⁴. */
  function asPower(bits) {
    const [m, k] = oddPower(bits);
    const whole = String(m).replace("-", MINUS);
    if (k === 0n) return whole;
    if (m === 1n || m === -1n) return `${m < 0n ? MINUS : ""}2${raise(k)}`;
    return `${whole} · 2${raise(k)}`;
  }

  /** All decimals of a finite float64; cut after `most` letters. */
  function decimals(bits, most = 60) {
    const [m, k] = oddPower(bits);
    const size = m < 0n ? -m : m;
    let text = String(k < 0n ? size * 5n ** -k : size << k);
    if (k < 0n) {
      text = text.padStart(Number(-k) + 1, "0");
      text = `${text.slice(0, Number(k))}.${text.slice(Number(k))}`;
    }
    if (text.length > most) {
      const zeros = /^0\.0{12,}/.exec(text);
      if (zeros || !text.slice(0, most).includes(".")) return null;
      text = `${text.slice(0, most)}…`;
    }
    return (isNegative(bits) ? "-" : "") + text;
  }

  /** Three digits, with a sign. */
  function threeDigits(number) {
    if (number === 0) return "0";
    const [head, exponent] = Math.abs(number).toExponential(2).split("e");
    const e = Number(exponent);
    const size = e >= -4 && e < 3 ? Math.abs(number).toFixed(2 - e) : `${head}e${e}`;
    return (number < 0 ? MINUS : "+") + size.replace("e-", `e${MINUS}`);
  }

  /** A ratio with a sign: in percent unless it is tiny. */
  function ratio(number) {
    const tiny = Math.abs(number) < 1e-4 || Math.abs(number) >= 10;
    return tiny || number === 0 ? threeDigits(number) : `${threeDigits(100 * number)}%`;
  }

  const hexOf = (code, format) =>
    `0x${code.toString(16).padStart(Math.ceil(format.bits / 4), "0")}`;
  const binaryOf = (code, format) => code.toString(2).padStart(format.bits, "0");

  // ------------------------------------------------------- 4 what is to be shown

  const NOTHING = "—";

  /** The bits of a code by field: [["sign", "0"], ["exponent", "0101"], ...]. */
  function fieldsOf(code, format) {
    const bits = binaryOf(code, format);
    const cut = (format.hasSign ? 1 : 0) + format.exponentBits;
    return [
      ["sign", bits.slice(0, cut - format.exponentBits)],
      ["exponent", bits.slice(cut - format.exponentBits, cut)],
      ["mantissa", bits.slice(cut)],
    ];
  }

  /** What a format makes of x: code, value, errors, and in two words what happened. */
  function look(x, format, rounding, overflow, given = null) {
    // A format without NaN can do nothing but saturate.
    const mode = format.hasNaN ? overflow : "saturate";
    if (isNaNBits(x) && !format.hasNaN) {
      const none = { code: null, value: null, error: null, relative: null };
      return { format, ...none, what: "has no NaN", kind: "lost" };
    }
    const found = encodeFully(x, format, rounding, mode);
    const code = given ?? found.code;
    const value = decode(code, format);
    const error = toNumber(value) - toNumber(x);
    const finite = Number.isFinite(toNumber(x)) && Number.isFinite(toNumber(value));
    return {
      format,
      code,
      value,
      error: finite ? error : null,
      relative: finite && absolute(x) !== 0n ? error / toNumber(x) : null,
      ...judge(x, value, code, found.over && given === null, format),
    };
  }

  function judge(x, value, code, over, format) {
    const said = (what, kind) => ({ what, kind });
    const finite = absolute(value) < INF;
    if (isNaNBits(x)) return said("NaN", "exact");
    if (isNaNBits(value) && !over) return said("has no negative numbers", "lost");
    if (over && absolute(x) === INF && !isNaNBits(value) && !finite) {
      return said("Inf", "exact");
    }
    if (over) return finite ? said("saturates", "lost") : said("overflows", "lost");
    if (absolute(value) === INF) return said("Inf", "exact");
    const zero = absolute(value) === 0n;
    if (absolute(x) === 0n && !zero) return said("has no zero", "lost");
    if (zero && absolute(x) !== 0n) return said("underflows", "lost");
    const field = (code & ((1n << format.magnitude) - 1n)) >> format.p;
    const low = format.hasZero && field === 0n && !zero ? ", subnormal" : "";
    if (x === value) return said(`exact${low}`, "exact");
    if (zero) return said("has no −0", "exact");
    return said(`rounded${low}`, "rounded");
  }

  /** In words, from where on numbers overflow. */
  function threshold(format, rounding) {
    const { max } = finfo(format);
    if (format.bits === 64) return "float64 holds all that can be typed here";
    const last = toNumber(max);
    const largest = shortest(max);
    if (rounding === "toward_zero") return "only Inf: the rest is rounded toward zero";
    if (rounding === "up") return `above ${largest}; below −${largest} only −Inf`;
    if (rounding === "down") return `below −${largest}; above ${largest} only Inf`;
    const tie = last + toNumber(ulp(max, format)) / 2;
    const { over } = encodeFully(toBits(tie), format, rounding, "saturate");
    return `${over ? "from" : "above"} ${shortest(toBits(tie))}`;
  }

  /** The same in Python: an expression for a reader to run. */
  function inPython(state, x, code, format) {
    const name = JSON.stringify(format.name);
    if (code !== null) {
      // An int64 holds the codes of float64, those of negative numbers as negative ones.
      const wraps = code >= SIGN;
      const spelled = hexOf(wraps ? 2n * SIGN - code : code, format);
      return `decode(torch.tensor(${wraps ? "-" : ""}${spelled}), ${name})`;
    }
    const finite = absolute(x) < INF;
    // With a point it is a float: torch takes no integer of more than 64 bits.
    const decimal = shortest(x).replace(/^-?\d+$/, "$&.0");
    const number = finite ? decimal : `float("${shortest(x)}")`;
    const rounding = state.rounding === "nearest" ? "" : `, "${state.rounding}"`;
    const ieee = state.overflow === "ieee" && format.hasNaN;
    return `round_to(${number}, ${name}${rounding}${ieee ? ', overflow="ieee"' : ""})`;
  }

  // ------------------------------------------------------- 5 the address

  const KEYS = ["x", "format", "rounding", "overflow"];

  /** The state as a fragment: what is as always is left out. */
  function toFragment(state, usual) {
    const said = (value) => encodeURIComponent(value).replace(/%2F/g, "/");
    return `#${KEYS.filter((key) => ["x", "format"].includes(key) || state[key] !== usual[key])
      .map((key) => `${key}=${said(state[key])}`)
      .join("&")}`;
  }

  /** The state that a fragment or a query asks for, and what is wrong with it. */
  function fromAddress(address, usual, formats) {
    const asked = new URLSearchParams(address.slice(1).replace(/\+/g, "%2B"));
    const state = { ...usual };
    const wrong = [];
    const allowed = {
      format: Object.fromEntries(formats.map((format) => [format.name, format])),
      rounding: ROUNDINGS,
      overflow: OVERFLOWS,
    };
    for (const [key, value] of asked) {
      if (allowed[key] && !Object.hasOwn(allowed[key], value)) {
        const known = Object.keys(allowed[key]).join(", ");
        wrong.push(`${key} “${value}” (there are ${known})`);
      } else if (KEYS.includes(key)) {
        state[key] = value;
      } else if (address.startsWith("#")) {
        wrong.push(`“${key}” (there are ${KEYS.join(", ")})`);
      }
    }
    try {
      read(state.x, allowed.format[state.format]);
    } catch {
      wrong.push(`x “${state.x}”, which is not a number or a code of ${state.format}`);
      state.x = usual.x;
    }
    return { state, message: aboutAddress(wrong) };
  }

  globalThis.halfTheBitsExplorer = {
    makeFormat, encode, decode, neighbours, ulp, finfo, toBits, toNumber, read,
    nearestFloat64, shortest, asPower, decimals, threeDigits, ratio, look, threshold,
    fromAddress, toFragment,
  };

  // ------------------------------------------------------- 6 the page

  const within = "hb-explorer__"; // every class of the explorer's begins so

  class Explorer extends Widget {
    constructor(root) {
      super(root, "explorer");
      this.formats = this.data.formats.map(makeFormat);
      this.usual = {
        x: this.data.number,
        format: this.data.format,
        rounding: "nearest",
        overflow: "saturate",
      };
      this.state = { ...this.usual };
      this.build(this.data.examples);
      this.enhanceTable();
      this.start();
    }

    toFragment() {
      return toFragment(this.state, this.usual);
    }

    fromAddress(address) {
      return fromAddress(address, this.usual, this.formats);
    }

    get format() {
      return this.formats.find((format) => format.name === this.state.format);
    }

    // -------------------------------------------------- the parts, made once

    build(examples) {
      this.input = make("input", {
        type: "text",
        id: "explorer-number",
        class: this.part("input"),
        autocomplete: "off",
        autocapitalize: "off",
        spellcheck: "false",
        enterkeyhint: "done",
        "aria-describedby": "explorer-read explorer-problem",
        oninput: () => this.change({ x: this.input.value }, { typed: true }),
        onkeydown: (event) => this.stepByKey(event),
      });
      this.select = make(
        "select",
        {
          id: "explorer-format",
          class: this.part("select"),
          autocomplete: "off",
          onchange: () => this.choose(this.select.value),
        },
        ...this.formats.map((format) => make("option", { text: format.name })),
      );
      this.readAs = make("p", { id: "explorer-read", class: `${within}hint` });
      const label = (to, text) =>
        make("label", { for: to, class: this.part("label"), text });

      const top = make(
        "div",
        { class: `${within}top` },
        make("div", {}, label("explorer-number", "Number, or code of the format"), this.input),
        make("div", {}, label("explorer-format", "Format"), this.select),
      );
      const tries = make(
        "ul",
        { class: `${within}examples`, "aria-label": "Numbers to try" },
        ...examples.map(({ x, format, why }) => {
          const link = make("a", { href: toFragment({ x, format }, {}) });
          link.append(make("b", { text: x }), " ", make("span", { text: why }));
          return make("li", {}, link);
        }),
      );

      this.bits = make("div", { class: `${within}bits`, role: "toolbar" });
      this.bits.addEventListener("keydown", (event) => this.moveByKey(event));
      this.value = make("strong", { class: `${within}value` });
      this.badge = make("span", { class: `${within}badge` });
      this.formula = make("span", { class: `${within}formula`, "aria-hidden": "true" });
      this.headline = make(
        "p",
        { class: `${within}headline` },
        this.formula, this.value, this.badge,
      );
      this.line = make("div", { class: `${within}line`, role: "img" });
      const step = (index, name) =>
        make(
          "button",
          { type: "button", class: `${within}step`, onclick: () => this.step(index) },
          make("span", { text: name }),
          make("b"),
        );
      this.steps = [step(0, "‹ previous value"), step(1, "next value ›")];
      this.facts = make("dl", { class: `${within}facts` });
      const taken = make(
        "section",
        { class: `${within}taken`, "aria-label": "One format, taken apart" },
        this.bits,
        this.headline,
        this.line,
        make("div", { class: `${within}steps` }, ...this.steps),
        this.facts,
      );

      this.choices = {};
      const choices = make(
        "div",
        { class: `${within}choices` },
        this.choice("rounding", "Rounding", ROUNDINGS),
        this.choice("overflow", "Beyond the largest number", OVERFLOWS),
      );

      const out = make(
        "div",
        { class: this.part("foot") },
        make("p", { class: `${within}python` }, "In Python: ", this.python),
        this.share,
      );
      const panel = make(
        "div",
        { class: this.part("panel") },
        top, this.problem, this.readAs, tries, taken, choices, out, this.status,
      );
      this.root.prepend(panel);
    }

    /** A group of radio buttons that show what each choice would give. */
    choice(key, title, names) {
      const rows = Object.entries(names).map(([name, text]) => {
        const radio = make("input", {
          type: "radio",
          name: `explorer-${key}`,
          value: name,
          autocomplete: "off",
          onchange: () => this.change({ [key]: name }),
        });
        const result = make("b");
        this.choices[key] ??= {};
        this.choices[key][name] = { radio, result };
        return make("label", {}, radio, make("span", { text }), result);
      });
      return make("fieldset", {}, make("legend", { text: title }), ...rows);
    }

    /** Make the names in the table buttons; its cells are written by `render`. */
    enhanceTable() {
      this.caption = this.root.querySelector("caption");
      this.rows = this.formats.map((format) => {
        const row = this.root.querySelector(`tr[data-format="${format.name}"]`);
        const name = row.querySelector("th");
        const button = make("button", {
          type: "button",
          text: format.name,
          onclick: () => this.choose(format.name),
        });
        name.replaceChildren(button);
        const cells = Object.fromEntries(
          ["sign", "exponent", "mantissa", "value", "what", "error", "relative"].map(
            (part) => [part, row.querySelector(`.${within}${part}`)],
          ),
        );
        return { format, row, button, cells };
      });
    }

    // -------------------------------------------------- what the reader does

    change(change, { typed = false, say = "" } = {}) {
      this.say = say;
      super.change(change, { typed });
    }

    restore(address) {
      this.say = "";
      super.restore(address);
    }

    /** Change the format, not the number: a code in the input would mean another. */
    choose(name) {
      const x = this.known && this.known.code !== null && shortest(this.known.bits);
      this.change(x ? { format: name, x } : { format: name });
    }

    step(index) {
      if (!this.known) return;
      const next = neighbours(this.known.bits, this.format)[index];
      if (!isNaNBits(next)) this.change({ x: shortest(next) });
    }

    stepByKey(event) {
      const index = ["ArrowDown", "ArrowUp"].indexOf(event.key);
      if (index < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      this.step(index);
    }

    flip(index) {
      const { format } = this;
      const code = this.code ^ (1n << BigInt(index));
      const value = decode(code, format);
      // A NaN has many codes: where the number does not say which, the code does.
      const isNaN = isNaNBits(value);
      const same = !isNaN || encode(value, format) === code;
      const x = same ? shortest(value) : hexOf(code, format);
      this.change({ x }, { say: `bit ${index} is ${(code >> BigInt(index)) & 1n}. ` });
    }

    moveByKey(event) {
      const buttons = [...this.bits.querySelectorAll("button")];
      const here = buttons.indexOf(document.activeElement);
      const to = {
        ArrowLeft: here - 1,
        ArrowRight: here + 1,
        Home: 0,
        End: buttons.length - 1,
      }[event.key];
      if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      const target = buttons[Math.max(0, Math.min(buttons.length - 1, to))];
      for (const button of buttons) button.tabIndex = button === target ? 0 : -1;
      target.focus();
    }

    // -------------------------------------------------- showing it

    render(typed = false) {
      const { state, format } = this;
      if (!typed && this.input.value !== state.x) this.input.value = state.x;
      this.select.value = state.format;
      for (const [key, choices] of Object.entries(this.choices)) {
        for (const [name, { radio }] of Object.entries(choices)) {
          radio.checked = state[key] === name;
        }
      }
      let known;
      try {
        known = read(state.x, format);
      } catch (error) {
        this.reject(error.message, typed);
        return;
      }
      this.accept(known);

      const x = known.bits;
      const seen = look(x, format, state.rounding, state.overflow, known.code);
      this.code = seen.code;
      this.renderRead(known);
      this.renderBits(seen);
      this.renderValue(seen);
      this.renderLine(x, seen);
      this.renderSteps(x);
      this.renderFacts(x, seen);
      this.renderChoices(x);
      this.renderTable(x);
      write(this.python, inPython(state, x, known.code, format));
      this.announce(this.inWords(x, seen), typed);
    }

    renderRead({ bits, code, exact }) {
      const finite = absolute(bits) < INF;
      let text = "";
      if (code !== null) text = `This code of ${this.state.format} is ${shown(bits)}.`;
      else if (!finite && !exact) text = `Beyond float64: read as ${shown(bits)}.`;
      else if (!finite) text = `Read as the float64 ${shown(bits)}.`;
      else if (exact) text = `Exactly the float64 ${asPower(bits)}.`;
      else {
        const all = decimals(bits, 46);
        text = `Read as the nearest float64, ${all ?? asPower(bits)}`;
        if (!text.endsWith("…")) text += ".";
      }
      write(this.readAs, text);
    }

    renderBits({ code, format }) {
      this.bits.hidden = code === null;
      if (code === null) return;
      if (this.bits.dataset.format !== format.name) this.makeBits(format);
      const text = binaryOf(code, format);
      for (const [i, { button, index, field }] of this.cells.entries()) {
        const bit = text[i];
        write(button, bit);
        button.setAttribute("aria-pressed", String(bit === "1"));
        button.setAttribute("aria-label", `bit ${index}, ${field}, ${bit}`);
      }
      const meaning = this.meaning(code, format);
      for (const [field, element] of Object.entries(this.meanings)) {
        write(element, meaning[field]);
      }
    }

    makeBits(format) {
      this.bits.dataset.format = format.name;
      this.bits.setAttribute(
        "aria-label",
        `Bits of ${format.name}; arrow keys move, space flips`,
      );
      this.bits.style.setProperty("--hb-columns", format.bits);
      this.bits.classList.toggle(`${within}bits--few`, format.bits <= 8);
      this.bits.classList.toggle(`${within}bits--many`, format.bits > 16);
      this.cells = [];
      this.meanings = {};
      const fields = [];
      for (const [field, bits] of fieldsOf(0n, format)) {
        if (!bits) continue;
        const cells = make("div", { class: `${within}cells` });
        for (let i = 0; i < bits.length; i += 1) {
          const index = format.bits - 1 - this.cells.length;
          const button = make("button", {
            type: "button",
            class: field,
            tabindex: this.cells.length ? "-1" : "0",
            title: `bit ${index}`,
            onclick: () => this.flip(index),
            onfocus: () => {
              for (const cell of this.cells) cell.button.tabIndex = -1;
              button.tabIndex = 0;
            },
          });
          this.cells.push({ button, index, field });
          cells.append(button);
        }
        this.meanings[field] = make("b");
        const name = bits.length > 1 ? `${field}, ${bits.length} bits` : field;
        fields.push(
          make(
            "div",
            { class: `${within}field ${field}`, style: `--hb-width: ${bits.length}` },
            cells,
            make("small", {}, make("span", { text: name }), this.meanings[field]),
          ),
        );
      }
      this.bits.replaceChildren(...fields);
    }

    /** What each field says, in numbers. */
    meaning(code, format) {
      const [sign, exponent, mantissa] = fieldsOf(code, format).map(([, bits]) =>
        bits ? BigInt(`0b${bits}`) : 0n,
      );
      const { bias, p } = format;
      const value = decode(code, format);
      const minus = (n) => String(n).replace("-", MINUS);
      const special = absolute(value) >= INF;
      const low = exponent === 0n && format.hasZero;
      const counted = low ? 1n : exponent;
      const power = `${exponent}${low ? ", so 1" : ""} ${MINUS} ${bias} = `;
      return {
        sign: sign ? MINUS : "+",
        exponent: special ? "a special code" : power + minus(counted - BigInt(bias)),
        mantissa: special
          ? shown(absolute(value)).replace("inf", "Inf").replace("nan", "NaN")
          : `${low ? 0 : 1} + ${mantissa} / ${1n << p}`,
      };
    }

    renderValue({ format, code, value, what, kind }) {
      const none = value === null;
      write(this.value, none ? "no code" : shown(value));
      write(this.badge, what);
      this.badge.className = `${within}badge ${within}badge--${kind}`;
      this.formula.replaceChildren();
      if (none || absolute(value) >= INF) return;
      const [sign, exponent, mantissa] = fieldsOf(code, format).map(([, bits]) =>
        bits ? BigInt(`0b${bits}`) : 0n,
      );
      const low = exponent === 0n && format.hasZero;
      const e = (low ? 1n : exponent) - BigInt(format.bias);
      const part = (name, ...children) => make("span", { class: name }, ...children);
      if (format.hasSign) {
        this.formula.append(part("sign", sign ? MINUS : "+"), " ");
      }
      this.formula.append(
        part("exponent", "2", make("sup", { text: String(e).replace("-", MINUS) })),
      );
      if (format.p > 0n) {
        const m = (low ? 0n : 1n << format.p) + mantissa;
        const text = `${m} / ${1n << format.p}`;
        this.formula.append(" · ", part("mantissa", text));
      }
      this.formula.append(" = ");
    }

    /**
     * Where x lies between the values beside it, and all that becomes what it becomes.
     * Places are fractions of the distance between the two, so that no scale is lost.
     */
    renderLine(x, { format, value, over }) {
      const [below, above] = neighbours(x, format);
      const hasPlace =
        value !== null && absolute(x) < INF && (format.hasSign || !isNegative(x));
      this.line.hidden = !hasPlace;
      if (!hasPlace) return;
      const at = toNumber(x);
      const step = toNumber(ulp(x, format));
      const isEnd = (bits) => !Number.isFinite(toNumber(bits));
      // At an end of the format, the line goes on as if there were one more value.
      let low = isEnd(below) ? null : toNumber(below);
      let high = isEnd(above) ? null : toNumber(above);
      const ends = [low === null, high === null];
      if (low === null) low = format.hasSign ? high - step : 0;
      if (high === null) high = low + step;
      const exact = at === toNumber(value) && !over;
      const margin = 0.2;
      const place = (number) => {
        const part = (number - low) / (high - low);
        return 100 * ((Math.min(Math.max(part, -0.6), 1.6) + margin) / (1 + 2 * margin));
      };
      const clip = (percent) => Math.min(100, Math.max(0, percent));
      const mark = (name, percent, ...children) =>
        make(
          "span",
          { class: `${within}${name}`, style: `--hb-at: ${percent.toFixed(3)}` },
          ...children,
        );

      const [from, to] = this.reach(x, format, low, high).map(place).map(clip);
      const region = make("span", {
        class: `${within}region`,
        style: `left: ${from.toFixed(3)}%; width: ${(to - from).toFixed(3)}%`,
      });
      const parts = [region, make("span", { class: `${within}axis` })];
      [low, high].forEach((number, i) => {
        const kind = ends[i] ? "end" : "tick";
        parts.push(mark(kind, place(number)));
      });
      const beyond = at > high ? " ›" : at < low ? "‹ " : "";
      const label = at > high ? shown(x) + beyond : beyond + shown(x);
      if (exact) parts.push(mark("tick", place(at)));
      parts.push(mark("x", clip(place(at)), make("b", { text: label }), make("i")));
      const result = toNumber(value);
      if (Number.isFinite(result) && place(result) >= 0 && place(result) <= 100) {
        parts.push(mark("dot", place(result)));
      }
      this.line.replaceChildren(...parts);
      const names = [below, above].map((bits) =>
        isNaNBits(bits) ? "no value" : shown(bits),
      );
      const told = exact ? "is a value itself" : `becomes ${shown(value)}`;
      this.line.setAttribute(
        "aria-label",
        `Number line: ${shown(x)} ${told}; below it is ${names[0]}, above it ${names[1]}`,
      );
    }

    /** From where to where, in sight, numbers become what x becomes. */
    reach(x, format, low, high) {
      const { rounding } = this.state;
      const result = (bits) => {
        const seen = look(bits, format, rounding, this.state.overflow);
        return seen.value === SIGN ? 0n : seen.value;
      };
      const wanted = result(x);
      const at = toNumber(x);
      const width = high - low;
      const same = (number) => result(toBits(number)) === wanted;
      // Borders lie at the values and half-way between: ask on either side of each.
      const marks = [at, (low + at) / 2, (at + high) / 2, (low + high) / 2];
      for (const part of [0, 0.25, 0.5, 1]) {
        marks.push(low - part * width, high + part * width);
      }
      const sorted = [...new Set(marks.filter(Number.isFinite))].sort((a, b) => a - b);
      let [from, to] = [at, at];
      for (let i = sorted.indexOf(at); i + 1 < sorted.length; i += 1) {
        const middle = sorted[i] + (sorted[i + 1] - sorted[i]) / 2;
        if (!same(middle)) break;
        to = sorted[i + 1];
      }
      for (let i = sorted.indexOf(at); i > 0; i -= 1) {
        const middle = sorted[i - 1] + (sorted[i] - sorted[i - 1]) / 2;
        if (!same(middle)) break;
        from = sorted[i - 1];
      }
      return [from, to];
    }

    renderSteps(x) {
      neighbours(x, this.format).forEach((bits, index) => {
        const none = isNaNBits(bits);
        const button = this.steps[index];
        write(button.lastChild, none ? "none" : shown(bits));
        button.setAttribute("aria-disabled", String(none));
      });
    }

    renderFacts(x, { format, code, value, error, relative }) {
      const finite = (bits) => bits !== null && absolute(bits) < INF;
      const step = ulp(x, format);
      const limits = finfo(format);
      const both = (bits) => {
        const [short, exact] = [shown(bits), asPower(bits)];
        return short.replace("-", MINUS) === exact ? short : `${short} = ${exact}`;
      };
      const inSteps = error === null ? 0 : Math.abs(error) / toNumber(step);
      const least = format.hasZero ? "smallest subnormal" : "smallest";
      const facts = [
        ["code", code === null ? "none" : `${hexOf(code, format)} = ${code}`],
        ["value, exactly", finite(value) ? asPower(value) : NOTHING],
        ["error", error === null ? NOTHING : threeDigits(error)],
        ["relative error", relative === null ? NOTHING : ratio(relative)],
        ["error in ulp", error === null ? NOTHING : threeDigits(inSteps).replace("+", "")],
        ["ulp, the step here", finite(step) ? both(step) : NOTHING],
        ["largest", both(limits.max)],
        ["overflows", threshold(format, this.state.rounding)],
        ["smallest normal", both(limits.smallest_normal)],
        [least, both(limits.smallest_subnormal)],
      ].filter(([name]) => format.hasZero || name !== "smallest normal");
      while (this.facts.children.length > facts.length) this.facts.lastChild.remove();
      facts.forEach(([name, text], i) => {
        const row =
          this.facts.children[i] ??
          this.facts.appendChild(make("div", {}, make("dt"), make("dd")));
        write(row.firstChild, name);
        write(row.lastChild, text);
      });
    }

    renderChoices(x) {
      const { state, format } = this;
      for (const [key, choices] of Object.entries(this.choices)) {
        for (const [name, { result }] of Object.entries(choices)) {
          const chosen = { ...state, [key]: name };
          const seen = look(x, format, chosen.rounding, chosen.overflow);
          const only = name === "ieee" && !format.hasNaN ? "saturates too" : "";
          write(result, only || (seen.value === null ? NOTHING : shown(seen.value)));
        }
      }
    }

    renderTable(x) {
      const { state } = this;
      const beyond = state.overflow === "saturate" ? "saturating" : "overflowing";
      const to = { nearest: "to nearest", toward_zero: "toward zero" };
      const rounded = `rounded ${to[state.rounding] ?? state.rounding}, ${beyond}`;
      write(this.caption, `${shown(x)} in every format, ${rounded}`);
      for (const { format, row, button, cells } of this.rows) {
        const isChosen = format.name === state.format;
        row.classList.toggle(`${within}chosen`, isChosen);
        button.setAttribute("aria-pressed", String(isChosen));
        const given = isChosen ? this.known.code : null;
        const seen = look(x, format, state.rounding, state.overflow, given);
        const fields = seen.code === null ? [] : fieldsOf(seen.code, format);
        const bits = Object.fromEntries(fields);
        for (const field of ["sign", "exponent", "mantissa"]) {
          write(cells[field], bits[field] ?? "");
        }
        write(cells.value, seen.value === null ? NOTHING : shown(seen.value));
        write(cells.what, seen.what);
        const { error, relative } = seen;
        write(cells.error, error === null ? NOTHING : threeDigits(error));
        write(cells.relative, relative === null ? NOTHING : ratio(relative));
      }
    }

    inWords(x, { format, value, what, relative }) {
      const off = relative ? `, off by ${ratio(relative)}` : "";
      const result = value === null ? what : `${shown(value)}, ${what}${off}`;
      return `${this.say ?? ""}${shown(x)} in ${format.name}: ${result}`;
    }
  }

  if (typeof document !== "undefined") {
    const root = document.querySelector(".hb-explorer");
    if (root) new Explorer(root);
  }
})();
