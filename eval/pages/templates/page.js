// Functions shared by the pages' scripts. Text from results is inserted as text, never as HTML.
"use strict";

const $ = id => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const readData = id => JSON.parse($(id).textContent);

function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

function draw(tag, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

const visible = token => token.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
const number = value => value === null || value === undefined ? "\u2013" :
  Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") :
    value !== 0 && Math.abs(value) < 1e-4 ? Number(value.toPrecision(3)).toExponential() : String(Number(value.toPrecision(3)));
