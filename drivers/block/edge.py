"""An edge of the graph: one node uses another, in a role and with permissions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from drivers.block.permission import ALL, NONE, Permission, names
from drivers.errors import OptionError

if TYPE_CHECKING:
    from drivers.block.node import Node


class Edge:
    """`parent` (None for a user outside the graph, as an export) uses `child`.

    The child closes when its last edge is detached.
    """

    def __init__(self, role: str, child: Node, *, parent: Node | None, user: str) -> None:
        self.role = role
        self.child = child
        self.parent = parent
        self.user = user
        self.needed = NONE
        self.shared = ALL

    async def set_permissions(self, needed: Permission, shared: Permission) -> None:
        """Ask for other permissions. Raises OptionError, with nothing changed, where another
        user of the child, here or in another process, forbids them."""
        for other in self.child.parents:
            if other is self:
                continue
            for wanted, allowed, holder in ((needed, other.shared, other), (other.needed, shared, self)):
                if wanted & ~allowed:
                    raise OptionError(
                        f"Conflicts with use by {holder.user} as '{holder.role}', "
                        f"which does not allow '{names(wanted & ~allowed)}' on {self.child.name}"
                    )
        if needed & Permission.WRITE and self.child.flags.read_only:
            raise OptionError("Block node is read-only")
        before = self.needed, self.shared
        self.needed, self.shared = needed, shared
        try:
            await self.child._permissions_changed(*self.child.cumulative_permissions())
        except BaseException:
            self.needed, self.shared = before
            raise

    async def detach(self) -> None:
        """Give the child up, whole even when cancelled."""
        self.child.parents.remove(self)
        if self.parent is not None:
            self.parent.children.pop(self.role, None)
        with trio.CancelScope(shield=True):
            if self.child.parents:
                await self.child._permissions_changed(*self.child.cumulative_permissions())
            else:
                await self.child.aclose()


async def attach(
    role: str, child: Node, *, parent: Node | None = None, user: str, needed: Permission, shared: Permission
) -> Edge:
    """Connect `parent` (or a user outside the graph) to `child` with these permissions.

    On failure the child is as it was.
    """
    edge = Edge(role, child, parent=parent, user=user)
    child.parents.append(edge)
    try:
        await edge.set_permissions(needed, shared)
    except BaseException:
        child.parents.remove(edge)
        raise
    if parent is not None:
        parent.children[role] = edge
    return edge
