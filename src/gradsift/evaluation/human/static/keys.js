"use strict";
// Keyboard shortcuts for the page's buttons and links; without this file they can still be clicked.
const targets = { 1: "first", ArrowLeft: "first", 0: "tie", t: "tie", x: "bad", 2: "second", ArrowRight: "second", b: "back" };
let left = false; // one key per page: a quick second press must not vote on the next pair
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
