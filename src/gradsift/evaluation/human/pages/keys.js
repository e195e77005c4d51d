"use strict";
// Keys for what the page's own buttons and links do; without this file they are clicked.
const targets = { 1: "first", ArrowLeft: "first", 0: "tie", t: "tie", x: "bad", 2: "second", ArrowRight: "second", b: "back" };
let left = false; // one key a page: the second of two quick ones is not meant for the next pair
addEventListener("pageshow", () => { left = false; });
addEventListener("keydown", (event) => {
  if (left || event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target.matches?.("input, textarea, summary")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const target = Object.hasOwn(targets, key) && document.getElementById(targets[key]);
  if (!target) return;
  event.preventDefault();
  left = true;
  target.click();
});
