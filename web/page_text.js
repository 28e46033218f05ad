// Text that a graph or a file holds, which the front end would read as HTML or Markdown.

// For a text on a node, the same as nodes/comfy_runtime.py makes of one: entities mean their character
// to the old front end (HTML) and to Nodes 2.0 (Markdown), where two spaces at its end break a line.
const MARKS = /[&<>[\]!*_`#|~\\]|:(?=\/\/)|w(?=ww\.)/gi;
export const asText = (text) => (
  text.replace(MARKS, (mark) => `&#${mark.charCodeAt(0)};`).replaceAll('\n', '  \n')
);

// For an entry of a menu, which is HTML in the old front end and text in Nodes 2.0.
export const label = (name) => String(name).replaceAll('<', '‹');
