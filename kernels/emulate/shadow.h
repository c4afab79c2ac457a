// What is known of every byte of a block's shared memory: who touched it since the last barrier, and who still has a copy under way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulate {

// When an access happened, as far as its thread knows: the block's barriers passed, and its warp's.
struct Moment {
    std::uint32_t block = 0, warp = 0;
    std::uint16_t thread = 0;
};

enum class Access { read, write, atomic };

// Earlier accesses a new one collides with.
struct Conflict {
    const char *kind = nullptr;  // none when null
    std::uint16_t other = 0;
};

class Shadow {
public:
    void resize(std::size_t bytes) {
        if (cells_.size() < bytes) cells_.resize(bytes);
    }

    // Notes an access to bytes [at, at + size) and tells what it races with.
    Conflict note(std::size_t at, std::size_t size, Access access, const Moment &now) {
        Conflict found;
        for (std::size_t byte = at; byte < at + size; ++byte) {
            const Conflict conflict = access == Access::read ? read(cells_[byte], now) : write(cells_[byte], access, now);
            if (conflict.kind) found = conflict;
        }
        return found;
    }

    // An asynchronous copy of `now.thread` will land here.
    Conflict promise(std::size_t at, std::size_t size, const Moment &now) {
        const Conflict conflict = note(at, size, Access::write, now);
        for (std::size_t byte = at; byte < at + size; ++byte) cells_[byte].pending = now.thread + 1u;
        return conflict;
    }

    // It has landed.
    void land(std::size_t at, std::size_t size, const Moment &now) {
        for (std::size_t byte = at; byte < at + size; ++byte) {
            cells_[byte].pending = 0;
            cells_[byte].writer = now;
            cells_[byte].atomic = false;
        }
    }

    // Forgets copies that a block left under way.
    void forget_promises(std::size_t bytes) {
        for (std::size_t byte = 0; byte < bytes; ++byte) cells_[byte].pending = 0;
    }

private:
    struct Cell {
        Moment writer, reader;
        std::uint32_t pending = 0;  // thread + 1
        bool atomic = false;        // the last write was atomic
        bool many = false;          // several threads have read since the barrier
        bool warps = false;         // and of several warps
    };

    static bool ordered(const Moment &before, const Moment &now) {
        if (before.block != now.block || before.thread == now.thread) return true;
        return before.thread / 32 == now.thread / 32 && before.warp < now.warp;
    }

    static Conflict read(Cell &cell, const Moment &now) {
        Conflict found;
        if (cell.pending) found = {"reads what an asynchronous copy that was not waited for writes, begun by", static_cast<std::uint16_t>(cell.pending - 1)};
        else if (!ordered(cell.writer, now)) found = {"reads what was written since the last barrier by", cell.writer.thread};
        const bool same_warp = cell.reader.thread / 32 == now.thread / 32;
        if (cell.reader.block != now.block || (same_warp && !cell.warps && cell.reader.warp < now.warp)) {
            cell.many = cell.warps = false;
        } else if (cell.reader.thread != now.thread) {
            cell.many = true;
            cell.warps = cell.warps || !same_warp;
        }
        cell.reader = now;
        return found;
    }

    static Conflict write(Cell &cell, Access access, const Moment &now) {
        Conflict found;
        if (cell.pending) found = {"writes what an asynchronous copy that was not waited for writes, begun by", static_cast<std::uint16_t>(cell.pending - 1)};
        else if (!ordered(cell.writer, now) && !(access == Access::atomic && cell.atomic))
            found = {"writes what was written since the last barrier by", cell.writer.thread};
        else if (!after_readers(cell, now)) found = {"writes what was read since the last barrier by", cell.reader.thread};
        cell.writer = now;
        cell.atomic = access == Access::atomic;
        return found;
    }

    static bool after_readers(const Cell &cell, const Moment &now) {
        if (cell.reader.block != now.block) return true;
        if (cell.warps) return false;
        if (cell.reader.thread / 32 != now.thread / 32) return false;
        return cell.reader.warp < now.warp || (!cell.many && cell.reader.thread == now.thread);
    }

    std::vector<Cell> cells_;
};

}  // namespace emulate
