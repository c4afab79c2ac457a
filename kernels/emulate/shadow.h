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

// Why an access is wrong, and the thread it collides with.
struct Conflict {
    enum { none, unwritten, pending, after_write, after_read } kind = none;
    std::uint16_t other = 0;

    const char *text(Access access) const {
        const bool reads = access == Access::read;
        switch (kind) {
            case unwritten: return "reads what nobody has written";
            case after_write:
                return reads ? "reads what was written since the last barrier by" : "writes what was written since the last barrier by";
            case after_read: return "writes what was read since the last barrier by";
            case pending: return "touches where an asynchronous copy lands that was not waited for, begun by";
            default: return "";
        }
    }
};

class Shadow {
public:
    void resize(std::size_t bytes) {
        if (cells_.size() < bytes) cells_.resize(bytes);
    }

    // From here on, what was written or promised before counts as gone.
    void begin(std::uint32_t epoch) { first_ = epoch; }

    // Notes an access to bytes [at, at + size) and tells what it races with.
    Conflict note(std::size_t at, std::size_t size, Access access, const Moment &now) {
        Conflict found;
        for (std::size_t byte = at; byte < at + size; ++byte) {
            const Conflict conflict = access == Access::read ? read(cells_[byte], now) : write(cells_[byte], access, now);
            if (conflict.kind != Conflict::none) found = conflict;
        }
        return found;
    }

    // An asynchronous copy of `now.thread` will land here.
    Conflict promise(std::size_t at, std::size_t size, const Moment &now) {
        const Conflict conflict = note(at, size, Access::write, now);
        for (std::size_t byte = at; byte < at + size; ++byte) cells_[byte].promise = now;
        return conflict;
    }

    // It has landed.
    void land(std::size_t at, std::size_t size, const Moment &now) {
        for (std::size_t byte = at; byte < at + size; ++byte) {
            cells_[byte].promise.block = 0;
            cells_[byte].writer = now;
            cells_[byte].atomic = false;
        }
    }

private:
    struct Cell {
        Moment writer, reader, promise;
        bool atomic = false;        // the last write was atomic
        bool many = false;          // several threads have read since the barrier
        bool warps = false;         // and of several warps
    };

    static bool ordered(const Moment &before, const Moment &now) {
        if (before.block != now.block || before.thread == now.thread) return true;
        return before.thread / 32 == now.thread / 32 && before.warp < now.warp;
    }

    Conflict read(Cell &cell, const Moment &now) const {
        Conflict found;
        if (cell.promise.block >= first_) found = {Conflict::pending, cell.promise.thread};
        else if (cell.writer.block < first_) found = {Conflict::unwritten, now.thread};
        else if (!ordered(cell.writer, now)) found = {Conflict::after_write, cell.writer.thread};
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

    Conflict write(Cell &cell, Access access, const Moment &now) const {
        Conflict found;
        const bool both_atomic = access == Access::atomic && cell.atomic;
        if (cell.promise.block >= first_) found = {Conflict::pending, cell.promise.thread};
        else if (access == Access::atomic && cell.writer.block < first_) found = {Conflict::unwritten, now.thread};
        else if (!ordered(cell.writer, now) && !both_atomic) found = {Conflict::after_write, cell.writer.thread};
        else if (!after_readers(cell, now)) found = {Conflict::after_read, cell.reader.thread};
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

    std::uint32_t first_ = 0;
    std::vector<Cell> cells_;
};

}  // namespace emulate
